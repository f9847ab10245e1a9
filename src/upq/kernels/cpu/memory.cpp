#include "memory.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <new>
#include <utility>

namespace upq::cpu {

namespace {

constexpr std::size_t huge_page = std::size_t{2} << 20;

std::size_t up_to(std::size_t bytes, std::size_t unit) { return (bytes + unit - 1) / unit * unit; }

}  // namespace

Pages::Pages(std::size_t bytes) : bytes_(up_to(bytes, static_cast<std::size_t>(sysconf(_SC_PAGESIZE)))) {
    if (bytes_ == 0) return;
    // Only memory that starts on a huge page's boundary can lie on huge pages: without them a stream of codes came in
    // at 31.6 instead of 33.9 GB/s. The surplus in front and behind goes back.
    const std::size_t slack = bytes_ >= huge_page ? huge_page : 0;
    void* found = mmap(nullptr, bytes_ + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (found == MAP_FAILED) throw std::bad_alloc();
    const auto start = reinterpret_cast<std::uintptr_t>(found);
    const std::size_t front = slack ? up_to(start, huge_page) - start : 0;
    data_ = static_cast<std::uint8_t*>(found) + front;
    if (front > 0) munmap(found, front);
    if (slack > front) munmap(data_ + bytes_, slack - front);
#ifdef MADV_HUGEPAGE
    if (slack) madvise(data_, bytes_, MADV_HUGEPAGE);  // a wish: a kernel without huge pages is only slower
#endif
}

Pages::Pages(Pages&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

Pages& Pages::operator=(Pages&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
}

Pages::~Pages() {
    if (data_) munmap(data_, bytes_);
}

}  // namespace upq::cpu
