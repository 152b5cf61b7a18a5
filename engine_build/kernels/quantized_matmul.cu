// y = x W^T for weights of 2 bits (float activations) and of 4 bits (8-bit activations), on tensor cores.
//
// Weights are the 16 rows of an mma, tokens its 8 columns: a decode step fills the columns with one token, a prefill
// takes many columns per row, and both are the same loop. A warp reads a row in runs of 128 inputs. `pack_runs` in
// packing.py has put the codes of each run in the order in which the four lanes of a row take them:
//
//   lane t owns inputs 32 q + 8 t .. + 7 of every block q = 0..3 of 32 inputs, 4 * bits bytes in one vector load;
//   2 bits: word q / 2, from bit 8 (q % 2) on: code 2 i at bit 2 i, code 2 i + 1 at bit 16 + 2 i;
//   4 bits: word q: code b at bit 8 b, code 4 + b at bit 8 b + 4.
//
// So fragments come from memory without shared memory or shuffles, activations in their natural order, and no mma spans
// two scales. Sums are float32 (int32 within a group for 8-bit activations) and scales multiply in float32.
//
// Rows of codes are filled up with zeros to whole runs, and rows of scales with them. `group_log2`: inputs per scale as
// a power of two, at least 32; 31 for one scale per row. `inputs` is a multiple of 8, so that every token is aligned;
// tokens and outputs may be any number.

#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <tensor_core.cuh>

constexpr int kRun = 128;
constexpr int kBlock = 32;
constexpr int kWarp = 32;

inline __device__ void store(half* place, float value) { *place = __float2half_rn(value); }
inline __device__ void store(__nv_bfloat16* place, float value) { *place = __float2bfloat16_rn(value); }
inline __device__ float load(half value) { return __half2float(value); }
inline __device__ float load(__nv_bfloat16 value) { return __bfloat162float(value); }

// Two 2-bit codes, in the low bits of each half of `pair`, as floats -2, -1, 0 or 1: with its sign bit flipped a code
// is itself plus 2, which the last places of a large power of two can hold; that power plus 2 is then subtracted.
template <typename Scalar>
__device__ uint32_t decode(uint32_t pair);

template <>
inline __device__ uint32_t decode<half>(uint32_t pair) // (1024 + 2 + code) * 1 - 1026
{
    return fma2<half>(pair ^ 0x64026402u, 0x3C003C00u, 0xE402E402u);
}

template <>
inline __device__ uint32_t decode<__nv_bfloat16>(uint32_t pair) // (128 + 2 + code) * 1 - 130
{
    return fma2<__nv_bfloat16>(pair ^ 0x43024302u, 0x3F803F80u, 0xC302C302u);
}

// 2-bit weights, activations in `Scalar`.
template <typename Scalar>
struct TwoBit
{
    using Input = Scalar;
    using Output = Scalar;
    using Sum = float;
    using Words = uint2;    // a lane's codes of one run and row
    using Fragment = uint4; // a lane's eight activations of one block and token
    static constexpr float kUnit = 1.0f;
    static constexpr int kSteps = 2;

    uint32_t weights[kSteps][4];

    __device__ TwoBit(Words upper, Words lower, int block)
    {
        uint32_t const up = (block < 2 ? upper.x : upper.y) >> (8 * (block % 2));
        uint32_t const low = (block < 2 ? lower.x : lower.y) >> (8 * (block % 2));
        for (int pair = 0; pair < 4; ++pair)
        {
            weights[pair / 2][pair % 2 * 2] = decode<Scalar>(up >> (2 * pair) & 0x00030003u);
            weights[pair / 2][pair % 2 * 2 + 1] = decode<Scalar>(low >> (2 * pair) & 0x00030003u);
        }
    }

    __device__ void add(Sum (&sum)[4], Fragment x) const
    {
        multiply<Scalar>(sum, weights[0], x.x, x.y);
        multiply<Scalar>(sum, weights[1], x.z, x.w);
    }

    // Eight activations of a token from input k on; those past the last input are zero.
    static __device__ Fragment activations(Input const* token, int k, int inputs)
    {
        return k < inputs ? *reinterpret_cast<uint4 const*>(token + k) : uint4{0, 0, 0, 0};
    }
};

// 4-bit weights, 8-bit activations: `quantize_rows` has filled their rows up to whole runs.
template <typename Scalar>
struct FourBit
{
    using Input = int8_t;
    using Output = Scalar;
    using Sum = int32_t;
    using Words = uint4;
    using Fragment = uint2;
    static constexpr float kUnit = 1.0f / 16; // codes stay in the upper half of their bytes: sixteen times their value
    static constexpr int kSteps = 1;

    uint32_t weights[kSteps][4];

    __device__ FourBit(Words upper, Words lower, int block)
    {
        uint32_t const up = block < 2 ? (block == 0 ? upper.x : upper.y) : (block == 2 ? upper.z : upper.w);
        uint32_t const low = block < 2 ? (block == 0 ? lower.x : lower.y) : (block == 2 ? lower.z : lower.w);
        weights[0][0] = up << 4 & 0xF0F0F0F0u;
        weights[0][1] = low << 4 & 0xF0F0F0F0u;
        weights[0][2] = up & 0xF0F0F0F0u;
        weights[0][3] = low & 0xF0F0F0F0u;
    }

    __device__ void add(Sum (&sum)[4], Fragment x) const { multiply(sum, weights[0], x.x, x.y); }

    static __device__ Fragment activations(Input const* token, int k, int)
    {
        return *reinterpret_cast<uint2 const*>(token + k);
    }
};

// One thread block computes kWarps / kSplit * kSlabs * 16 outputs of kTiles * 8 tokens; kSplit warps share the runs of
// a row. Grid: outputs, then tokens. token_scales: null for float activations.
template <typename Format, int kTiles, int kSlabs, int kSplit, int kThreads>
__device__ void quantized_matmul(typename Format::Input const* __restrict__ x, float const* __restrict__ token_scales,
    uint32_t const* __restrict__ codes, half const* __restrict__ scales, int tokens, int outputs, int inputs,
    int groups, int group_log2, typename Format::Output* __restrict__ y)
{
    using Words = typename Format::Words;
    constexpr int kWarps = kThreads / kWarp;
    constexpr int kRows = kSlabs * 16;
    constexpr int kColumns = kTiles * 8;
    constexpr int kTeams = kWarps / kSplit;
    int const warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    int const upper = lane / 4, quarter = lane % 4; // the lane's first row, or its token, and its share of a run
    int const team = warp / kSplit, first_run = warp % kSplit;
    int const first_row = (blockIdx.x * kTeams + team) * kRows;
    int const first_token = blockIdx.y * kColumns;
    int const runs = (inputs + kRun - 1) / kRun;
    int const padded = runs * kRun;
    int const stride = sizeof(typename Format::Input) == 1 ? padded : inputs;

    float total[kSlabs][kTiles][4] = {};
#pragma unroll(kSplit > 1 ? 2 : 1) // more loads on their way where little is computed per load
    for (int run = first_run; run < runs; run += kSplit)
    {
        Words words[kSlabs][2];
        size_t row[kSlabs][2]; // past the last output its row is read again, and not written
        for (int slab = 0; slab < kSlabs; ++slab)
            for (int half_slab = 0; half_slab < 2; ++half_slab)
            {
                int const wanted = first_row + slab * 16 + half_slab * 8 + upper;
                row[slab][half_slab] = wanted < outputs ? wanted : outputs - 1;
                size_t const place = (row[slab][half_slab] * runs + run) * 4 + quarter;
                words[slab][half_slab] = reinterpret_cast<Words const*>(codes)[place];
            }
        typename Format::Sum sum[kSlabs][kTiles][4] = {};
#pragma unroll
        for (int block = 0; block < kRun / kBlock; ++block)
        {
            int const start = run * kRun + block * kBlock;
            if (start >= inputs)
                break;
            typename Format::Fragment fragment[kTiles];
            for (int tile = 0; tile < kTiles; ++tile)
            {
                int const token = first_token + tile * 8 + upper;
                fragment[tile] = {};
                if (token < tokens)
                    fragment[tile] = Format::activations(x + size_t(token) * stride, start + quarter * 8, inputs);
            }
            int const end = start + kBlock;
            bool const scaled = end >= inputs || block == kRun / kBlock - 1 || (end & ((1u << group_log2) - 1)) == 0;
            for (int slab = 0; slab < kSlabs; ++slab)
            {
                Format const weights(words[slab][0], words[slab][1], block);
                for (int tile = 0; tile < kTiles; ++tile)
                    weights.add(sum[slab][tile], fragment[tile]);
                if (!scaled)
                    continue;
                int const group = start >> group_log2;
                float const scale[2]
                    = {load(scales[row[slab][0] * groups + group]), load(scales[row[slab][1] * groups + group])};
                for (int tile = 0; tile < kTiles; ++tile)
                    for (int place = 0; place < 4; ++place)
                    {
                        total[slab][tile][place] += float(sum[slab][tile][place]) * scale[place / 2];
                        sum[slab][tile][place] = 0;
                    }
            }
        }
    }

    __shared__ float sums[kWarps][kColumns][kRows + 1];
    for (int slab = 0; slab < kSlabs; ++slab)
        for (int tile = 0; tile < kTiles; ++tile)
            for (int place = 0; place < 4; ++place)
                sums[warp][tile * 8 + quarter * 2 + place % 2][slab * 16 + place / 2 * 8 + upper]
                    = total[slab][tile][place];
    __syncthreads();
    for (int item = threadIdx.x; item < kTeams * kColumns * kRows; item += kThreads)
    {
        int const row = item % kRows, column = item / kRows % kColumns, from = item / (kRows * kColumns);
        int const output = (blockIdx.x * kTeams + from) * kRows + row, token = first_token + column;
        if (output >= outputs || token >= tokens)
            continue;
        float value = 0;
        for (int part = 0; part < kSplit; ++part)
            value += sums[from * kSplit + part][column][row];
        float const unit = Format::kUnit * (token_scales ? token_scales[token] : 1.0f);
        store(y + size_t(token) * outputs + output, value * unit);
    }
}

// The larger number, or NaN if either is NaN: unlike fmaxf this hides no damage.
inline __device__ float larger(float left, float right) { return right > left || right != right ? right : left; }

// Rounds every token to 8 bits: scale = max|x| / 127, codes to nearest even, rows filled up with zeros to whole runs.
// A token of zeros gets scale 1; one that is not finite gets a scale, and so outputs, that are not. One thread block
// per token.
template <typename Scalar, int kThreads>
__device__ void quantize_rows(
    Scalar const* __restrict__ x, int inputs, int32_t* __restrict__ codes, float* __restrict__ scales)
{
    __shared__ float peaks[kThreads];
    Scalar const* token = x + size_t(blockIdx.x) * inputs;
    int const words = (inputs + kRun - 1) / kRun * (kRun / 4);
    float peak = 0;
    for (int k = threadIdx.x; k < inputs; k += THREADS)
        peak = larger(peak, fabsf(load(token[k])));
    peaks[threadIdx.x] = peak;
    for (int distance = kThreads / 2; distance > 0; distance /= 2)
    {
        __syncthreads();
        if (threadIdx.x < distance)
            peaks[threadIdx.x] = larger(peaks[threadIdx.x], peaks[threadIdx.x + distance]);
    }
    __syncthreads();
    float const scale = peaks[0] == 0 ? 1.0f : peaks[0] / 127;
    for (int word = threadIdx.x; word < words; word += THREADS)
    {
        uint32_t packed = 0;
        for (int byte = 0; byte < 4; ++byte)
        {
            int const k = 4 * word + byte;
            float const code = k < inputs ? rintf(load(token[k]) / scale) : 0.0f;
            packed |= (uint32_t(int32_t(fminf(fmaxf(code, -127.0f), 127.0f))) & 0xFFu) << (8 * byte);
        }
        codes[size_t(blockIdx.x) * words + word] = int32_t(packed);
    }
    if (threadIdx.x == 0)
        scales[blockIdx.x] = scale;
}

// One entry point per compilation, as `Kernel` in this folder's __init__.py says. Parameters are in TensorRT's order:
// inputs, numbers, outputs.
#if defined(W2A16)
extern "C" __global__ void __launch_bounds__(THREADS) NAME(SCALAR const* x, uint32_t const* codes,
    half const* scales, int tokens, int outputs, int inputs, int groups, int group_log2, SCALAR* y)
{
    quantized_matmul<TwoBit<SCALAR>, TILES, SLABS, SPLIT, THREADS>(
        x, nullptr, codes, scales, tokens, outputs, inputs, groups, group_log2, y);
}
#elif defined(W4A8)
extern "C" __global__ void __launch_bounds__(THREADS) NAME(int8_t const* x, float const* token_scales,
    uint32_t const* codes, half const* scales, int tokens, int outputs, int inputs, int groups, int group_log2,
    SCALAR* y)
{
    quantized_matmul<FourBit<SCALAR>, TILES, SLABS, SPLIT, THREADS>(
        x, token_scales, codes, scales, tokens, outputs, inputs, groups, group_log2, y);
}
#else
extern "C" __global__ void __launch_bounds__(THREADS) NAME(
    SCALAR const* x, int inputs, int32_t* codes, float* scales)
{
    quantize_rows<SCALAR, THREADS>(x, inputs, codes, scales);
}
#endif
