#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace upq::cpu {

class Mapping;

// Zeroed memory straight from the system, on huge pages where it is large enough for them.
class Pages {
   public:
    Pages() = default;
    explicit Pages(std::size_t bytes);  // throws std::bad_alloc
    // For what lives as long as its neighbours, as the weights of a model do: what is smaller than a huge page shares
    // some with others, and its memory goes back to the system with the last of them.
    static Pages among_others(std::size_t bytes);
    Pages(Pages&& other) noexcept;
    Pages& operator=(Pages&& other) noexcept;

    std::uint8_t* data() const { return data_; }
    std::size_t bytes() const { return bytes_; }

   private:
    Pages(std::shared_ptr<Mapping> mapping, std::size_t at, std::size_t bytes);

    std::shared_ptr<Mapping> mapping_;
    std::uint8_t* data_ = nullptr;
    std::size_t bytes_ = 0;
};

}  // namespace upq::cpu
