// Tokens of float16 rounded to 8 bits, for the products with 4-bit weights. Its one entry point is the last function.

#include <cstdint>
#include <cuda_fp16.h>

#include <tensor_core.cuh>

constexpr int kRun = 128; // inputs that a product takes at once

// The larger number, or NaN if either is NaN: unlike fmaxf this hides no damage.
inline __device__ float larger(float left, float right) { return right > left || right != right ? right : left; }

// The larger magnitude of two float16.
inline __device__ float magnitude(uint32_t two) { return larger(fabsf(low_half(two)), fabsf(low_half(two >> 16))); }

// Rounds every token to 8 bits: scale = max|x| / 127, codes to nearest even, rows filled up with zeros to whole runs.
// A token of zeros gets scale 1; one that is not finite gets a scale, and so outputs, that are not. One thread block
// per token; `inputs` is a multiple of 8.
extern "C" __global__ void __launch_bounds__(THREADS) NAME(
    half const* __restrict__ x, int inputs, uint2* __restrict__ codes, float* __restrict__ scales)
{
    __shared__ float peaks[THREADS];
    uint4 const* const token = reinterpret_cast<uint4 const*>(x + size_t(blockIdx.x) * inputs);
    int const chunks = inputs / 8, filled = (inputs + kRun - 1) / kRun * (kRun / 8);
    float peak = 0;
    for (int chunk = threadIdx.x; chunk < chunks; chunk += THREADS)
    {
        uint4 const eight = token[chunk];
        peak = larger(larger(peak, magnitude(eight.x)), magnitude(eight.y));
        peak = larger(larger(peak, magnitude(eight.z)), magnitude(eight.w));
    }
    peaks[threadIdx.x] = peak;
    for (int distance = THREADS / 2; distance > 0; distance /= 2)
    {
        __syncthreads();
        if (threadIdx.x < distance)
            peaks[threadIdx.x] = larger(peaks[threadIdx.x], peaks[threadIdx.x + distance]);
    }
    __syncthreads();
    float const scale = peaks[0] == 0 ? 1.0f : peaks[0] / 127;
    auto const code = [scale](uint32_t bits) {
        float const rounded = fminf(fmaxf(rintf(low_half(bits) / scale), -127.0f), 127.0f);
        return uint32_t(int32_t(rounded)) & 0xFFu;
    };
    auto const four = [code](uint32_t first, uint32_t second) {
        return code(first) | code(first >> 16) << 8 | code(second) << 16 | code(second >> 16) << 24;
    };
    for (int chunk = threadIdx.x; chunk < filled; chunk += THREADS)
    {
        uint2 rounded = {0, 0};
        if (chunk < chunks)
        {
            uint4 const eight = token[chunk];
            rounded = {four(eight.x, eight.y), four(eight.z, eight.w)};
        }
        codes[size_t(blockIdx.x) * filled + chunk] = rounded;
    }
    if (threadIdx.x == 0)
        scales[blockIdx.x] = scale;
}
