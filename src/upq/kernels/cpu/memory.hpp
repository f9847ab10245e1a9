#pragma once

#include <cstddef>
#include <cstdint>

namespace upq::cpu {

// Zeroed memory straight from the system, on huge pages where it is large enough for them.
class Pages {
   public:
    Pages() = default;
    explicit Pages(std::size_t bytes);  // throws std::bad_alloc
    Pages(Pages&& other) noexcept;
    Pages& operator=(Pages&& other) noexcept;
    ~Pages();

    std::uint8_t* data() const { return data_; }
    std::size_t bytes() const { return bytes_; }

   private:
    std::uint8_t* data_ = nullptr;
    std::size_t bytes_ = 0;
};

}  // namespace upq::cpu
