// The instructions that only a GPU has. The tests put a model of them in this file's place and run the rest on a CPU.
#pragma once

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// sum += a * b over 16 inputs in 16-bit floats, float32 sums: weights are the 16 rows, tokens the 8 columns.
template <typename Scalar>
__device__ void multiply(float (&sum)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1);

template <>
inline __device__ void multiply<half>(float (&sum)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
inline __device__ void multiply<__nv_bfloat16>(float (&sum)[4], uint32_t const (&a)[4], uint32_t b0, uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
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

// a * b + c for two 16-bit floats at once, rounded once.
template <typename Scalar>
__device__ uint32_t fma2(uint32_t a, uint32_t b, uint32_t c);

template <>
inline __device__ uint32_t fma2<half>(uint32_t a, uint32_t b, uint32_t c)
{
    uint32_t result;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}

template <>
inline __device__ uint32_t fma2<__nv_bfloat16>(uint32_t a, uint32_t b, uint32_t c)
{
    uint32_t result;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
    return result;
}
