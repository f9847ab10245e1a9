// The binding of the decoder. upq/kernels/decoder.py checks what goes in and keeps alive what is pointed to.

#include "decoder_module.hpp"

#include <nanobind/stl/vector.h>

#include <new>
#include <utility>
#include <vector>

#include "decoder.hpp"
#include "dispatch.hpp"

namespace nb = nanobind;
using namespace upq::cpu;

namespace {

template <class T>
const T* at(std::uintptr_t address) {
    return reinterpret_cast<const T*>(address);
}

// A block around each kind of what follows its attention.
template <class... Kinds>
void bind_block(nb::module_& m) {
    nb::class_<Block> bound(m, "Block");
    const auto bind = [&]<class Kind>(const Kind*) {
        bound.def(
            "__init__",
            [](Block* self, const std::vector<Norm>& norms, std::vector<Linear> qkv, const Linear& o, const Kind& mlp,
               Activation activation, float scaling, std::int64_t rope, std::int64_t window, float residual) {
                new (self) Block{
                    norms.at(0), norms.at(1), norms.at(2), norms.at(3), norms.at(4), norms.at(5), std::move(qkv), o, mlp,
                    activation, scaling, rope, window, residual
                };
            }
        );
    };
    (bind(static_cast<const Kinds*>(nullptr)), ...);
}

}  // namespace

void bind_decoder(nb::module_& m) {
    nb::class_<Dense>(m, "Dense").def(
        "__init__", [](Dense* self, std::int64_t rows, std::int64_t columns, std::uintptr_t data, Real real) {
            new (self) Dense{rows, columns, at<void>(data), real};
        }
    );
    nb::class_<Canonical>(m, "Canonical")
        .def(
            "__init__",
            [](Canonical* self, std::int64_t rows, std::int64_t columns, std::int64_t groups, int bits,
               std::uintptr_t codes, std::uintptr_t scales, std::uintptr_t zeros, float zero, Real real) {
                new (self) Canonical{
                    rows, columns, groups, bits, at<std::uint8_t>(codes), at<void>(scales), at<void>(zeros), zero, real
                };
            }
        );
    nb::class_<Linear>(m, "Linear")
        .def(
            "__init__",
            [](Linear* self, const PackedMatrix* weight, std::uintptr_t bias) { new (self) Linear{weight, at<float>(bias)}; }
        )
        .def("__init__", [](Linear* self, const Dense& weight, std::uintptr_t bias) {
            new (self) Linear{weight, at<float>(bias)};
        });
    nb::class_<Norm>(m, "Norm").def("__init__", [](Norm* self, std::uintptr_t weight, float eps, std::int64_t size) {
        new (self) Norm{at<float>(weight), eps, size};
    });
    nb::class_<Mlp>(m, "Mlp").def("__init__", [](Mlp* self, std::vector<Linear> gate_up, const Linear& down) {
        new (self) Mlp{std::move(gate_up), down};
    });
    nb::class_<Experts>(m, "Experts")
        .def(
            "__init__",
            [](Experts* self, const Dense& router, std::vector<Mlp> experts, std::int64_t chosen, bool normalised) {
                new (self) Experts{router, std::move(experts), chosen, normalised};
            }
        );
    nb::enum_<Activation>(m, "Activation").value("silu", Activation::silu).value("gelu_tanh", Activation::gelu_tanh);
    nb::enum_<Stored>(m, "Stored").value("float32", Stored::f32).value("int8", Stored::int8);
    bind_block<Mlp, Experts>(m);
    nb::class_<Rope>(m, "Rope").def(
        "__init__", [](Rope* self, std::uintptr_t frequencies, std::int64_t pairs, float scaling) {
            new (self) Rope{at<float>(frequencies), pairs, scaling};
        }
    );
    nb::class_<Dimensions>(m, "Dimensions")
        .def(
            "__init__",
            [](Dimensions* self, std::int64_t hidden, std::int64_t heads, std::int64_t kv_heads, std::int64_t head_dim,
               float embedding_scale, std::vector<Rope> ropes) {
                new (self) Dimensions{hidden, heads, kv_heads, head_dim, embedding_scale, std::move(ropes)};
            }
        );
    nb::class_<Decoder>(m, "Decoder")
        .def(nb::init<const Dimensions&, const Canonical&, std::vector<Block>, const Norm&, const Linear&, Stored>())
        .def(nb::init<const Dimensions&, const Dense&, std::vector<Block>, const Norm&, const Linear&, Stored>())
        .def("open", &Decoder::open)
        .def("close", &Decoder::close)
        .def("length", &Decoder::length)
        .def("truncate", &Decoder::truncate)
        .def_prop_ro("cached_bytes", &Decoder::cached_bytes)
        .def(
            "forward",
            [](Decoder& self, const std::vector<std::int32_t>& texts, const std::vector<std::size_t>& counts,
               std::uintptr_t ids, Compute compute, int threads, std::size_t isa, std::uintptr_t logits) {
                nb::gil_scoped_release release;
                std::vector<Portion> portions;
                const std::int32_t* next = at<std::int32_t>(ids);
                for (std::size_t i = 0; i < texts.size(); next += counts[i++]) portions.push_back({texts[i], {next, counts[i]}});
                self.forward(*available().at(isa), portions, compute, threads, reinterpret_cast<float*>(logits));
            }
        );
}
