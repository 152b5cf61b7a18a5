// Memory that a thread keeps from call to call.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

constexpr int64_t kAligned = 64;

// Bytes from an address that is a multiple of 64, kept by a thread from call to call: fresh memory would be filled with
// zeros page by page every time.
class Scratch {
public:
    uint8_t* of(int64_t bytes)
    {
        if (bytes > size_) {
            size_ = (bytes + kAligned - 1) / kAligned * kAligned;
            memory_.reset(static_cast<uint8_t*>(std::aligned_alloc(kAligned, size_t(size_))));
        }
        return memory_.get();
    }

private:
    struct Free {
        void operator()(uint8_t* memory) const { std::free(memory); }
    };
    std::unique_ptr<uint8_t, Free> memory_;
    int64_t size_ = 0;
};
