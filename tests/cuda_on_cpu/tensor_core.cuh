// A model of the tensor-core instructions, written from the tables of fragments in NVIDIA's PTX ISA, sections
// "Matrix Fragments for mma.m16n8k16 with floating point type" and "... mma.m16n8k32".
#pragma once

#include "cuda_fp16.h"

namespace cuda_on_cpu
{
// Element `part` of lane `lane`: the 4-byte register that holds it, and where it stands in the matrix.
struct Element
{
    int place, row, column;
};

inline Element of_a(int lane, int part, int per_register)
{
    int const place = part / per_register, group = lane / 4, in_group = lane % 4;
    return {place, group + (place % 2 ? 8 : 0), in_group * per_register + part % per_register + (place / 2) * 4 * per_register};
}

inline Element of_b(int lane, int part, int per_register)
{
    int const place = part / per_register, group = lane / 4, in_group = lane % 4;
    return {place, in_group * per_register + part % per_register + place * 4 * per_register, group};
}

// d[16][8] = c + a[16][depth] b[depth][8], `read` taking one element out of a register.
template <int kPerRegister, typename Sum, typename Read>
void matrix_multiply(Sum (&sum)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1, Read read)
{
    constexpr int kDepth = 8 * kPerRegister;
    Warp& warp = warps[threadIdx.x / kWarp];
    int const lane = threadIdx.x % kWarp;
    for (int place = 0; place < 4; ++place)
        warp.a[lane][place] = a[place];
    warp.b[lane][0] = b0;
    warp.b[lane][1] = b1;
    wait(warp.barrier);
    if (!warp.together)
        for (int other = 0; other < kWarp; ++other)
        {
            for (int part = 0; part < 4 * kPerRegister; ++part)
            {
                Element const at = of_a(other, part, kPerRegister);
                warp.rows[at.row][at.column] = read(warp.a[other][at.place], part % kPerRegister);
            }
            for (int part = 0; part < 2 * kPerRegister; ++part)
            {
                Element const at = of_b(other, part, kPerRegister);
                warp.columns[at.row][at.column] = read(warp.b[other][at.place], part % kPerRegister);
            }
        }
    warp.together = true;
    for (int place = 0; place < 4; ++place)
        for (int k = 0; k < kDepth; ++k)
            sum[place] += Sum(warp.rows[lane / 4 + place / 2 * 8][k] * warp.columns[k][lane % 4 * 2 + place % 2]);
    wait(warp.barrier);
    warp.together = false;
}

inline float read_half(uint32_t word, int part) { return __half2float({uint16_t(word >> (16 * part))}); }
inline int32_t read_byte(uint32_t word, int part) { return int8_t(word >> (8 * part)); }
} // namespace cuda_on_cpu

inline void multiply(float (&sum)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1)
{
    cuda_on_cpu::matrix_multiply<2>(sum, a, b0, b1, cuda_on_cpu::read_half);
}

inline void multiply(int32_t (&sum)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1)
{
    cuda_on_cpu::matrix_multiply<4>(sum, a, b0, b1, cuda_on_cpu::read_byte);
}

inline uint32_t fma2(uint32_t a, uint32_t b, uint32_t c)
{
    using namespace cuda_on_cpu;
    uint32_t result = 0;
    for (int part = 0; part < 2; ++part)
        result |= uint32_t(__float2half_rn(read_half(a, part) * read_half(b, part) + read_half(c, part)).bits) << (16 * part);
    return result;
}

inline uint32_t mul2(uint32_t a, uint32_t b)
{
    using namespace cuda_on_cpu;
    uint32_t result = 0;
    for (int part = 0; part < 2; ++part)
        result |= uint32_t(__float2half_rn(read_half(a, part) * read_half(b, part)).bits) << (16 * part);
    return result;
}

inline uint32_t pick_bytes(uint32_t word, uint32_t order)
{
    uint32_t result = 0;
    for (int place = 0; place < 4; ++place)
    {
        uint32_t const wanted = order >> (4 * place) & 7;
        result |= (wanted < 4 ? word >> (8 * wanted) & 0xFF : 0) << (8 * place);
    }
    return result;
}

inline float as_float(int32_t bits) { return as<float>(bits); }

inline float low_half(uint32_t bits) { return __half2float({uint16_t(bits)}); }

// Copies happen when they are awaited: whoever reads before sees what was there.
inline void copy_async(void* shared, void const* global, bool there)
{
    cuda_on_cpu::fibers[threadIdx.x].copies.back().push_back({shared, there ? global : nullptr});
}

inline void commit_copies() { cuda_on_cpu::fibers[threadIdx.x].copies.emplace_back(); }

template <int kLeft>
inline void await_copies()
{
    auto& groups = cuda_on_cpu::fibers[threadIdx.x].copies; // the last of them is not committed yet
    for (; groups.size() > kLeft + 1; groups.pop_front())
        for (cuda_on_cpu::Copy const& copy : groups.front())
            if (copy.from)
                std::memcpy(copy.to, copy.from, 16);
            else
                std::memset(copy.to, 0, 16);
}
