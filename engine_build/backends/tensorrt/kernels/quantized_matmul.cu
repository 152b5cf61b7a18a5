// y = x W^T for weights of 2 bits (float16 activations) and of 4 bits (8-bit activations), on tensor cores.
//
// Weights are the 16 rows of an mma, tokens its 8 columns. `pack_runs` in packing.py has cut the weights into slabs of
// 16 outputs and runs of 128 inputs, and has put the codes of a slab's run in the order in which a warp takes them:
//
//   lane l owns outputs l / 4 and l / 4 + 8, and of every block q = 0..3 of 32 inputs 32 q + 8 (l % 4) .. + 7;
//   2 bits: 16 bytes per lane, two words for either output: word q / 2, from bit 8 (q % 2) on: code 2 i at bit 2 i,
//           code 2 i + 1 at bit 16 + 2 i;
//   4 bits: 16 bytes per lane for the first output, then for all lanes 16 for the second: word q: code b at bit 8 b,
//           code 4 + b at bit 8 b + 4.
//
// So a warp reads whole lines, fragments come from memory without shuffles, activations in their natural order, and no
// mma spans two scales. Sums are float32 (int32 within a group for 8-bit activations), scales multiply in float32.
//
// Outputs are filled up to whole slabs and inputs to whole runs with zero codes and zero scales. `inputs` is a multiple
// of 8, so that every token is aligned; tokens may be any number. GROUP: inputs per scale, 32, 64 or 128, or 0 for one
// scale per row: then sums go on over the whole row, exactly in int32 (16 * 8 * 127 per input: up to 132,000 inputs),
// and are scaled once. `groups`: scales of a row.
//
// One entry point per compilation, as `Kernel` in this folder's __init__.py says. Parameters are in TensorRT's order:
// inputs, numbers, outputs.

#include <cstdint>
#include <cuda_fp16.h>

#include <tensor_core.cuh>

constexpr int kRun = 128;
constexpr int kWarp = 32;
constexpr int kBlock = 32;
constexpr int kBlocks = kRun / kBlock;
constexpr int kSlab = 16;
constexpr int kColumns = 8;
constexpr int kRow = 0; // as a group: all of a row

// Two 2-bit codes of `word`, at bits 2 `pair` and 16 + 2 `pair`, as floats -2, -1, 0 or 1. With its sign bit flipped a
// code is itself plus 2. The last places of 1024 hold it, 4^pair times as large; that is undone, and 1024 taken off.
template <int pair>
inline __device__ uint32_t decode(uint32_t word)
{
    constexpr uint32_t kFlipped = 0x64006400u | 0x00020002u << 2 * pair;
    constexpr uint32_t kFactor[] = {0x3C003C00u, 0x34003400u, 0x2C002C00u, 0x24002400u};  // 4^-pair
    constexpr uint32_t kOffset[] = {0xE402E402u, 0xDC08DC08u, 0xD420D420u, 0xCC80CC80u}; // -(1024 4^-pair + 2)
    return fma2(word & 0x00030003u << 2 * pair ^ kFlipped, kFactor[pair], kOffset[pair]);
}

// 2-bit weights, float16 activations.
struct TwoBit
{
    using Input = half;
    using Sum = float;
    using Fragment = uint4; // a lane's eight activations of one block and token
    static constexpr float kUnit = 1.0f;
    struct Words // a lane's codes of one slab's run
    {
        uint4 both;
    };

    uint32_t weights[2][4]; // of one block

    __device__ TwoBit(Words const& words, int block)
    {
        uint32_t const up = (block < 2 ? words.both.x : words.both.y) >> 8 * (block % 2);
        uint32_t const low = (block < 2 ? words.both.z : words.both.w) >> 8 * (block % 2);
        weights[0][0] = decode<0>(up), weights[0][1] = decode<0>(low);
        weights[0][2] = decode<1>(up), weights[0][3] = decode<1>(low);
        weights[1][0] = decode<2>(up), weights[1][1] = decode<2>(low);
        weights[1][2] = decode<3>(up), weights[1][3] = decode<3>(low);
    }

    __device__ void add(Sum (&sum)[4], Fragment const& x) const
    {
        multiply(sum, weights[0], x.x, x.y);
        multiply(sum, weights[1], x.z, x.w);
    }

    static __device__ Words load(uint4 const* codes, size_t place, int lane) { return {codes[place * kWarp + lane]}; }
};

// 4-bit weights, 8-bit activations.
struct FourBit
{
    using Input = int8_t;
    using Sum = int32_t;
    using Fragment = uint2;
    static constexpr float kUnit = 1.0f / 16; // codes stay in the upper half of their bytes: sixteen times their value
    struct Words
    {
        uint4 upper, lower;
    };

    uint32_t weights[4];

    __device__ FourBit(Words const& words, int block)
    {
        uint32_t const up = word(words.upper, block), low = word(words.lower, block);
        weights[0] = up << 4 & 0xF0F0F0F0u;
        weights[1] = low << 4 & 0xF0F0F0F0u;
        weights[2] = up & 0xF0F0F0F0u;
        weights[3] = low & 0xF0F0F0F0u;
    }

    __device__ void add(Sum (&sum)[4], Fragment const& x) const { multiply(sum, weights, x.x, x.y); }

    static __device__ Words load(uint4 const* codes, size_t place, int lane)
    {
        uint4 const* run = codes + place * (2 * kWarp);
        return {run[lane], run[kWarp + lane]};
    }

    static __device__ uint32_t word(uint4 const& words, int block)
    {
        return block < 2 ? (block == 0 ? words.x : words.y) : (block == 2 ? words.z : words.w);
    }
};

// What a lane sums up over a row: codes times activations, or, where scales come between, those scaled.
template <typename Format, int kGroup>
struct Total
{
    using Type = float;
};

template <typename Format>
struct Total<Format, kRow>
{
    using Type = typename Format::Sum;
};

// The scale of an output, of 16, of a slab whose rows have one scale each; 1 for rows that are scaled already.
template <int kGroup>
inline __device__ float row_scale(uint32_t const* scales, int slab, int output)
{
    return kGroup == kRow ? low_half(scales[size_t(slab) * 8 + output % 8] >> 16 * (output / 8)) : 1.0f;
}

// A lane's scales of one slab's run: those of its two outputs, per group.
template <int kGroup>
struct Scales
{
    static constexpr int kCount = kRun / kGroup;
    uint32_t pairs[kCount];

    __device__ Scales(uint32_t const* scales, int slab, int run, int groups, int lane)
    {
        for (int group = 0; group < kCount; ++group)
            pairs[group] = scales[(size_t(slab) * groups + run * kCount + group) * 8 + lane / 4];
    }

    __device__ float of(int group, int output) const { return low_half(pairs[group] >> 16 * output); }
};

template <>
struct Scales<kRow>
{
    __device__ Scales(uint32_t const*, int, int, int, int) {}
};

// total += one run of a slab times kTiles * 8 tokens, of rows with scales in between.
template <typename Format, int kTiles, int kGroup, typename Fragments>
inline __device__ void add_scaled_run(
    float (&total)[kTiles][4], typename Format::Words const& words, Scales<kGroup> const& scales, Fragments fragment)
{
    typename Format::Sum sum[kTiles][4] = {};
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
    {
        Format const weights(words, block);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
            weights.add(sum[tile], fragment(tile, block));
        if ((block + 1) * kBlock % kGroup != 0)
            continue;
        int const group = block * kBlock / kGroup;
        float const scale[2] = {scales.of(group, 0), scales.of(group, 1)};
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
            for (int place = 0; place < 4; ++place)
            {
                total[tile][place] += float(sum[tile][place]) * scale[place / 2];
                sum[tile][place] = 0;
            }
    }
}

// total += one run of a slab times kTiles * 8 tokens; `fragment(tile, block)` gives a lane's activations.
template <typename Format, int kTiles, int kGroup, typename Sums, typename Fragments>
inline __device__ void add_run(
    Sums (&total)[kTiles][4], typename Format::Words const& words, Scales<kGroup> const& scales, Fragments fragment)
{
    if constexpr (kGroup == kRow)
    {
#pragma unroll
        for (int block = 0; block < kBlocks; ++block)
        {
            Format const weights(words, block);
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile)
                weights.add(total[tile], fragment(tile, block));
        }
    }
    else
        add_scaled_run<Format>(total, words, scales, fragment);
}

// For a decode step. One thread block computes 16 outputs of 8 tokens; its warps share the runs, each kAhead at a time,
// all of whose loads are on their way before the first is used. Grid: slabs, then tokens. token_scales: null for float
// activations.
template <typename Format, int kGroup, int kAhead, int kThreads>
__device__ void few_tokens(typename Format::Input const* __restrict__ x, float const* __restrict__ token_scales,
    uint4 const* __restrict__ codes, uint32_t const* __restrict__ scales, int tokens, int outputs, int inputs,
    int groups, half* __restrict__ y)
{
    using Fragment = typename Format::Fragment;
    constexpr int kWarps = kThreads / kWarp;
    int const warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    int const slab = blockIdx.x, token = blockIdx.y * kColumns + lane / 4;
    int const runs = (inputs + kRun - 1) / kRun;
    typename Format::Input const* const mine = x + size_t(token) * inputs + lane % 4 * 8;

    using Sums = typename Total<Format, kGroup>::Type;
    Sums total[1][4] = {};
    for (int first = warp; first < runs; first += kWarps * kAhead)
    {
        typename Format::Words words[kAhead];
        Fragment fragments[kAhead][kBlocks];
        for (int ahead = 0; ahead < kAhead; ++ahead)
        {
            int const run = first + ahead * kWarps;
            words[ahead] = {};
            if (run < runs)
                words[ahead] = Format::load(codes, size_t(slab) * runs + run, lane);
            for (int block = 0; block < kBlocks; ++block)
            {
                int const start = run * kRun + block * kBlock;
                fragments[ahead][block] = {};
                if (token < tokens && start + lane % 4 * 8 < inputs)
                    fragments[ahead][block] = *reinterpret_cast<Fragment const*>(mine + start);
            }
        }
#pragma unroll
        for (int ahead = 0; ahead < kAhead; ++ahead)
        {
            int const run = first + ahead * kWarps < runs ? first + ahead * kWarps : first;
            Scales<kGroup> const run_scales(scales, slab, run, groups, lane);
            add_run<Format, 1>(
                total, words[ahead], run_scales, [&](int, int block) -> Fragment const& { return fragments[ahead][block]; });
        }
    }

    __shared__ Sums sums[kWarps][kColumns][kSlab];
    for (int place = 0; place < 4; ++place)
        sums[warp][lane % 4 * 2 + place % 2][place / 2 * 8 + lane / 4] = total[0][place];
    __syncthreads();
    for (int item = threadIdx.x; item < kColumns * kSlab; item += kThreads)
    {
        int const output = item % kSlab, column = item / kSlab, owner = blockIdx.y * kColumns + column;
        if (owner >= tokens)
            continue;
        Sums value = 0;
        for (int part = 0; part < kWarps; ++part)
            value += sums[part][column][output];
        float const unit = Format::kUnit * (token_scales ? token_scales[owner] : 1.0f);
        float const scaled = float(value) * row_scale<kGroup>(scales, slab, output);
        y[size_t(owner) * outputs + slab * kSlab + output] = __float2half_rn(scaled * unit);
    }
}

// For a prompt. One thread block computes kWarps * kSlabs * 16 outputs of kTiles * 8 tokens; all its warps read the
// tokens' run from shared memory while the next one is on its way. Grid: outputs, then tokens.
template <typename Format, int kGroup, int kTiles, int kSlabs, int kThreads>
__device__ void many_tokens(typename Format::Input const* __restrict__ x, float const* __restrict__ token_scales,
    uint4 const* __restrict__ codes, uint32_t const* __restrict__ scales, int tokens, int outputs, int inputs,
    int groups, half* __restrict__ y)
{
    using Input = typename Format::Input;
    using Fragment = typename Format::Fragment;
    constexpr int kWarps = kThreads / kWarp;
    constexpr int kTokens = kTiles * kColumns, kOutputs = kWarps * kSlabs * kSlab;
    constexpr int kRow = kRun + kBlock; // in shared memory: eight lanes' fragments lie in different banks
    constexpr int kChunk = 16 / sizeof(Input);
    struct Results
    {
        half rows[kTokens][kOutputs + 8];
    };
    union Shared
    {
        Input runs[2][kTokens][kRow];
        Results results;
    };
    __shared__ uint4 memory[(sizeof(Shared) + sizeof(uint4) - 1) / sizeof(uint4)];
    Shared& shared = *reinterpret_cast<Shared*>(memory);

    int const warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    int const first_token = blockIdx.y * kTokens;
    int const runs = (inputs + kRun - 1) / kRun, last_slab = outputs / kSlab - 1;
    int slabs[kSlabs]; // past the last one it is read again, and not written
    for (int slab = 0; slab < kSlabs; ++slab)
    {
        int const wanted = (blockIdx.x * kWarps + warp) * kSlabs + slab;
        slabs[slab] = wanted < last_slab ? wanted : last_slab;
    }
    auto const fetch = [&](int run) {
        for (int item = threadIdx.x; item < kTokens * (kRun / kChunk); item += kThreads)
        {
            int const row = item / (kRun / kChunk), column = item % (kRun / kChunk) * kChunk;
            bool const there = first_token + row < tokens && run * kRun + column < inputs;
            size_t const place = there ? size_t(first_token + row) * inputs + run * kRun + column : 0;
            copy_async(&shared.runs[run % 2][row][column], x + place, there);
        }
    };

    typename Total<Format, kGroup>::Type total[kSlabs][kTiles][4] = {};
    typename Format::Words words[kSlabs];
    for (int slab = 0; slab < kSlabs; ++slab)
        words[slab] = Format::load(codes, size_t(slabs[slab]) * runs, lane);
    fetch(0);
    commit_copies();
    for (int run = 0; run < runs; ++run)
    {
        int const next = run + 1 < runs ? run + 1 : run;
        if (next > run)
            fetch(next);
        commit_copies();
        typename Format::Words coming[kSlabs];
        for (int slab = 0; slab < kSlabs; ++slab)
            coming[slab] = Format::load(codes, size_t(slabs[slab]) * runs + next, lane);
        await_copies_but_last();
        __syncthreads();
        Input const* const mine = &shared.runs[run % 2][lane / 4][lane % 4 * 8];
#pragma unroll
        for (int slab = 0; slab < kSlabs; ++slab)
        {
            Scales<kGroup> const run_scales(scales, slabs[slab], run, groups, lane);
            add_run<Format, kTiles>(total[slab], words[slab], run_scales, [&](int tile, int block) {
                return *reinterpret_cast<Fragment const*>(mine + tile * kColumns * kRow + block * kBlock);
            });
        }
        __syncthreads();
#pragma unroll
        for (int slab = 0; slab < kSlabs; ++slab)
            words[slab] = coming[slab];
    }

#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
        for (int column = 0; column < 2; ++column)
        {
            int const row = tile * kColumns + lane % 4 * 2 + column, token = first_token + row;
            float const unit = Format::kUnit * (token_scales && token < tokens ? token_scales[token] : 1.0f);
#pragma unroll
            for (int slab = 0; slab < kSlabs; ++slab)
#pragma unroll
                for (int lower = 0; lower < 2; ++lower)
                {
                    int const output = lower * 8 + lane / 4;
                    float const scaled = float(total[slab][tile][lower * 2 + column])
                        * row_scale<kGroup>(scales, slabs[slab], output);
                    shared.results.rows[row][(warp * kSlabs + slab) * kSlab + output] = __float2half_rn(scaled * unit);
                }
        }
    __syncthreads();
    constexpr int kWide = 8; // outputs of one store
    for (int item = threadIdx.x; item < kTokens * (kOutputs / kWide); item += kThreads)
    {
        int const row = item / (kOutputs / kWide), column = item % (kOutputs / kWide) * kWide;
        int const token = first_token + row, output = blockIdx.x * kOutputs + column;
        if (token < tokens && output < outputs)
            *reinterpret_cast<uint4*>(y + size_t(token) * outputs + output)
                = *reinterpret_cast<uint4 const*>(&shared.results.rows[row][column]);
    }
}

#if defined(FEW)
#define CUT(Format) few_tokens<Format, GROUP, AHEAD, THREADS>
#else
#define CUT(Format) many_tokens<Format, GROUP, TILES, SLABS, THREADS>
#endif

#if defined(W2A16)
extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(half const* x, uint4 const* codes, uint32_t const* scales,
    int tokens, int outputs, int inputs, int groups, half* y)
{
    CUT(TwoBit)(x, nullptr, codes, scales, tokens, outputs, inputs, groups, y);
}
#else
extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(int8_t const* x, float const* token_scales,
    uint4 const* codes, uint32_t const* scales, int tokens, int outputs, int inputs, int groups, half* y)
{
    CUT(FourBit)(x, token_scales, codes, scales, tokens, outputs, inputs, groups, y);
}
#endif
