// The extension module upq.kernels._cpu. upq/kernels/cpu.py checks what goes in; nothing here is meant for users.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>
#include <vector>

#include "books.hpp"
#include "decoder_module.hpp"
#include "dispatch.hpp"
#include "linears.hpp"
#include "threads.hpp"

namespace nb = nanobind;
using namespace upq::cpu;

namespace {

using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

// Scales and zeros come as bytes too, so that no type of 16 bits needs a name here.
PackedMatrix pack(
    const Bytes& codes, const Bytes& scales, const std::optional<Bytes>& zeros, float zero, Real real, int bits,
    std::int64_t columns, int threads
) {
    const auto rows = static_cast<std::int64_t>(codes.shape(0));
    const auto groups = static_cast<std::int64_t>(scales.shape(1)) / (real == Real::f32 ? 4 : 2);
    const Canonical source{
        rows, columns, groups, bits, codes.data(), scales.data(), zeros ? zeros->data() : nullptr, zero, real
    };
    nb::gil_scoped_release release;
    return PackedMatrix(source, threads);
}

using Floats = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;

PackedBooks pack_books(const Bytes& codes, const Floats& values, const Floats& scales) {
    const auto rows = static_cast<std::int64_t>(codes.shape(0)), books = static_cast<std::int64_t>(values.shape(0));
    const std::int64_t columns = static_cast<std::int64_t>(codes.shape(1)) / books * book_vector;
    const CanonicalBooks source{rows, columns, static_cast<int>(books), codes.data(), values.data(), scales.data()};
    nb::gil_scoped_release release;
    return PackedBooks(source);
}

void multiply_books(
    std::uintptr_t x, Real real, std::int64_t tokens, const PackedBooks& matrix, std::uintptr_t output,
    std::uintptr_t bias, Real bias_real, int threads, std::size_t isa
) {
    const BookMatrix& w = matrix.view();
    const Output y{reinterpret_cast<void*>(output), real, reinterpret_cast<const void*>(bias), bias_real};
    const Rows rows{reinterpret_cast<const void*>(x), real, tokens, w.vectors * book_vector};
    nb::gil_scoped_release release;
    book_linear(*available().at(isa), rows, w, y, threads);
}

// Tensors come as addresses: taking one over DLPack costs 2.5 µs, and a token of a small model passes 100 linears and
// more in 7 ms. The caller holds them for as long as this runs.
void multiply(
    std::uintptr_t x, Real real, std::int64_t tokens, const std::vector<const PackedMatrix*>& matrices,
    const std::vector<std::uintptr_t>& outputs, const std::vector<std::uintptr_t>& biases,
    const std::vector<Real>& bias_reals, Compute compute, int threads, std::size_t isa
) {
    std::vector<Product> products;
    for (std::size_t i = 0; i < matrices.size(); ++i) {
        const auto* bias = reinterpret_cast<const void*>(biases[i]);
        products.push_back({matrices[i], {reinterpret_cast<void*>(outputs[i]), real, bias, bias_reals[i]}});
    }
    const Rows rows{reinterpret_cast<const void*>(x), real, tokens, matrices.front()->view().segments.columns};
    nb::gil_scoped_release release;
    linears(*available().at(isa), rows, products, compute, threads);
}

const float* floats(std::uintptr_t address) { return reinterpret_cast<const float*>(address); }
float* out(std::uintptr_t address) { return reinterpret_cast<float*>(address); }

void fake_seq(
    std::uintptr_t w, std::uintptr_t scale, std::int64_t groups, std::int64_t size, float n, std::uintptr_t fake,
    int threads, std::size_t isa
) {
    nb::gil_scoped_release release;
    const Kernels& kernels = *available().at(isa);
    parallel(useful_threads(groups * size, threads), [&](int thread, int team) {
        kernels.fake_seq(floats(w), floats(scale), share(groups, thread, team), size, n, out(fake));
    });
}

void seq_gradient(
    std::uintptr_t grad, std::uintptr_t w, std::uintptr_t scale, std::int64_t groups, std::int64_t size, float n,
    float bound, float factor, std::uintptr_t d_w, std::uintptr_t d_delta, int threads, std::size_t isa
) {
    nb::gil_scoped_release release;
    const Kernels& kernels = *available().at(isa);
    parallel(useful_threads(groups * size, threads), [&](int thread, int team) {
        const Range mine = share(groups, thread, team);
        kernels.seq_gradient(floats(grad), floats(w), floats(scale), mine, size, n, bound, factor, out(d_w), out(d_delta));
    });
}

void gjs(
    std::uintptr_t student, Real student_real, std::uintptr_t teacher, Real teacher_real, std::int64_t tokens,
    std::int64_t vocabulary, float beta, std::uintptr_t value, std::uintptr_t grad, int threads, std::size_t isa
) {
    nb::gil_scoped_release release;
    const Kernels& kernels = *available().at(isa);
    const Rows own{reinterpret_cast<const void*>(student), student_real, tokens, vocabulary};
    const Rows its{reinterpret_cast<const void*>(teacher), teacher_real, tokens, vocabulary};
    parallel(useful_threads(tokens * vocabulary, threads), [&](int thread, int team) {
        kernels.gjs(own, its, share(tokens, thread, team), beta, out(value), out(grad));
    });
}

}  // namespace

NB_MODULE(_cpu, m) {
    nb::enum_<Real>(m, "Real").value("f32", Real::f32).value("f16", Real::f16).value("bf16", Real::bf16);
    nb::enum_<Compute>(m, "Compute").value("w2a8", Compute::w2a8).value("w2a16", Compute::w2a16);
    nb::class_<PackedMatrix>(m, "PackedMatrix")
        .def_prop_ro("rows", [](const PackedMatrix& w) { return w.view().rows; })
        .def_prop_ro("columns", [](const PackedMatrix& w) { return w.view().segments.columns; })
        .def_prop_ro("nbytes", &PackedMatrix::bytes);
    m.def("pack", &pack, nb::arg(), nb::arg(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg());
    m.def("multiply", &multiply);
    m.def("fake_seq", &fake_seq);
    m.def("seq_gradient", &seq_gradient);
    m.def("gjs", &gjs);
    nb::class_<PackedBooks>(m, "PackedBooks")
        .def_prop_ro("rows", [](const PackedBooks& w) { return w.view().rows; })
        .def_prop_ro("columns", [](const PackedBooks& w) { return w.view().vectors * book_vector; })
        .def_prop_ro("nbytes", &PackedBooks::bytes);
    m.def("pack_books", &pack_books);
    m.def("multiply_books", &multiply_books);
    bind_decoder(m);
    m.def("isas", [] {
        std::vector<std::string> names;
        for (const Kernels* kernels : available()) names.emplace_back(kernels->name);
        return names;
    });
#ifdef _OPENMP
    m.attr("openmp") = true;
#else
    m.attr("openmp") = false;
#endif
}
