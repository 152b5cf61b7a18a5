// The instructions that only a GPU has. The tests put a model of them in this file's place and run the rest on a CPU.
#pragma once

#include <cstdint>
#include <cuda_fp16.h>

// sum += a * b over 16 inputs in float16, float32 sums: weights are the 16 rows, tokens the 8 columns.
inline __device__ void multiply(float (&sum)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// sum += a * b over 32 inputs in 8-bit integers, exact int32 sums.
inline __device__ void multiply(int32_t (&sum)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(sum[0]), "+r"(sum[1]), "+r"(sum[2]), "+r"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// a * b + c for two float16 at once, rounded once.
inline __device__ uint32_t fma2(uint32_t a, uint32_t b, uint32_t c)
{
    uint32_t result;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}

// a * b for two float16 at once.
inline __device__ uint32_t mul2(uint32_t a, uint32_t b)
{
    uint32_t result;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
    return result;
}

// The bytes of `word` that the nibbles of `order` name, lowest first; 4 names a zero.
inline __device__ uint32_t pick_bytes(uint32_t word, uint32_t order) { return __byte_perm(word, 0, order); }

// The float16 in the lower half of `bits`.
inline __device__ float low_half(uint32_t bits) { return __half2float(__ushort_as_half(uint16_t(bits))); }

// The float32 of these bits.
inline __device__ float as_float(int32_t bits) { return __int_as_float(bits); }

// Copies 16 bytes into shared memory, or zeros if they are not `there`, until `await_copies` has returned.
inline __device__ void copy_async(void* shared, void const* global, bool there)
{
    uint32_t const place = uint32_t(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(place), "l"(global), "r"(there ? 16 : 0)
                 : "memory");
}

// The copies of this thread since the last call are one group.
inline __device__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all groups of this thread but the last kLeft; a barrier then makes them visible to the other threads.
template <int kLeft>
inline __device__ void await_copies()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}
