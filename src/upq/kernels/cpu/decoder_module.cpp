// Binding of the decoder. upq/decoding.py builds it from a transformers model and keeps alive what it points to.

#include "decoder_module.hpp"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include "decoder.hpp"
#include "dispatch.hpp"

namespace nb = nanobind;
using namespace upq::cpu;

namespace {

const void* address(std::uintptr_t p) { return reinterpret_cast<const void*>(p); }

}  // namespace

void bind_decoder(nb::module_& m) {
    nb::class_<Dense>(m, "Dense").def(
        "__init__", [](Dense* self, std::uintptr_t data, Real real, std::int64_t rows, std::int64_t columns) {
            new (self) Dense{address(data), real, rows, columns};
        }
    );
    nb::class_<Table>(m, "Table")
        .def("__init__", [](Table* self, const Dense& rows) { new (self) Table{rows}; })
        .def(
            "__init__",
            [](Table* self, std::uintptr_t codes, std::uintptr_t scales, std::uintptr_t zeros, float zero, Real real,
               int bits, std::int64_t rows, std::int64_t columns, std::int64_t groups) {
                new (self) Table{Canonical{
                    rows, columns, groups, bits, static_cast<const std::uint8_t*>(address(codes)), address(scales),
                    address(zeros), zero, real
                }};
            }
        );
    nb::class_<Linear>(m, "Linear")
        .def("__init__", [](Linear* self, const PackedMatrix* w, std::vector<float> bias) { new (self) Linear{w, bias}; })
        .def("__init__", [](Linear* self, const Dense& w, std::vector<float> bias) { new (self) Linear{w, bias}; });
    nb::class_<Norm>(m, "Norm").def("__init__", [](Norm* self, std::vector<float> weight, float eps) {
        new (self) Norm{std::move(weight), eps};
    });
    nb::class_<Block>(m, "Block")
        .def(nb::init<>())
        .def_rw("before_attention", &Block::before_attention)
        .def_rw("before_mlp", &Block::before_mlp)
        .def_rw("of_queries", &Block::of_queries, nb::arg().none())
        .def_rw("of_keys", &Block::of_keys, nb::arg().none())
        .def_rw("q", &Block::q)
        .def_rw("k", &Block::k)
        .def_rw("v", &Block::v)
        .def_rw("o", &Block::o)
        .def_rw("gate", &Block::gate)
        .def_rw("up", &Block::up)
        .def_rw("down", &Block::down)
        .def_rw("rotary", &Block::rotary)
        .def_rw("window", &Block::window);
    nb::class_<Shape>(m, "Shape").def(
        "__init__",
        [](Shape* self, std::int64_t hidden, std::int64_t heads, std::int64_t kv_heads, std::int64_t head_dim,
           std::int64_t vocabulary, float scaling, std::vector<float> frequencies, float rotary_scaling) {
            new (self) Shape{hidden, heads, kv_heads, head_dim, vocabulary, scaling, std::move(frequencies), rotary_scaling};
        }
    );
    nb::class_<Decoder>(m, "Decoder")
        .def(nb::init<Shape, Table, std::vector<Block>, Norm, Linear>())
        .def_prop_ro("length", &Decoder::length)
        .def("truncate", &Decoder::truncate)
        .def(
            "forward",
            [](Decoder& self, std::uintptr_t ids, std::size_t tokens, Compute compute, int threads, std::size_t isa,
               std::uintptr_t logits) {
                nb::gil_scoped_release release;
                self.forward(
                    *available().at(isa), {static_cast<const std::int32_t*>(address(ids)), tokens}, compute, threads,
                    reinterpret_cast<float*>(logits)
                );
            }
        );
}
