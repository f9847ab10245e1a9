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
    nb::class_<Norm>(m, "Norm").def("__init__", [](Norm* self, std::uintptr_t weight, float eps) {
        new (self) Norm{at<float>(weight), eps};
    });
    nb::class_<Block>(m, "Block")
        .def(
            "__init__",
            [](Block* self, const Norm& before_attention, const Norm& before_mlp, const Norm& of_queries,
               const Norm& of_keys, const std::vector<Linear>& linears, bool rotary, std::int64_t window) {
                new (self) Block{
                    before_attention, before_mlp, of_queries, of_keys, linears.at(0), linears.at(1), linears.at(2),
                    linears.at(3), linears.at(4), linears.at(5), linears.at(6), rotary, window
                };
            }
        );
    nb::class_<Dimensions>(m, "Dimensions")
        .def(
            "__init__",
            [](Dimensions* self, std::int64_t hidden, std::int64_t mlp, std::int64_t heads, std::int64_t kv_heads,
               std::int64_t head_dim, float scaling, std::uintptr_t frequencies, float rotary_scaling) {
                new (self) Dimensions{
                    hidden, mlp, heads, kv_heads, head_dim, scaling, at<float>(frequencies), rotary_scaling
                };
            }
        );
    nb::class_<Decoder>(m, "Decoder")
        .def(nb::init<const Dimensions&, const Canonical&, std::vector<Block>, const Norm&, const Linear&>())
        .def(nb::init<const Dimensions&, const Dense&, std::vector<Block>, const Norm&, const Linear&>())
        .def_prop_ro("length", &Decoder::length)
        .def("truncate", &Decoder::truncate)
        .def(
            "forward",
            [](Decoder& self, std::uintptr_t ids, std::size_t tokens, Compute compute, int threads, std::size_t isa,
               std::uintptr_t logits) {
                nb::gil_scoped_release release;
                self.forward(
                    *available().at(isa), {at<std::int32_t>(ids), tokens}, compute, threads,
                    reinterpret_cast<float*>(logits)
                );
            }
        );
}
