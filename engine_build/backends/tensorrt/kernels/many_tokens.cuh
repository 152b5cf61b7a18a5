// The products for a prompt.
#pragma once

#include <formats.cuh>

// One thread block computes kWarps * kSlabs * 16 outputs of kTokens tokens. Each weight is decoded once in it: its warps
// share the tokens and have outputs of their own, whose codes they ask for a run ahead, straight into registers. A stage
// is 128 bytes of every token and the scales that belong to them; kStages - 1 of them are on their way while one is
// multiplied. block: of the part's outputs. token_scales: null for float activations.
template <typename Format, int kGroup, int kTokens, int kSlabs, int kStages, int kThreads>
struct ManyTokens
{
    using Input = typename Format::Input;
    using Fragment = typename Format::Fragment;
    using Words = typename Format::Words;
    using Sum = typename Format::Sum;
    using Sums = typename Total<Format, kGroup>::Type;

    static constexpr int kWarps = kThreads / kWarp, kTiles = kTokens / kColumns;
    static constexpr int kBlockSlabs = kWarps * kSlabs, kOutputs = kBlockSlabs * kSlab;
    static constexpr int kChunk = 16, kChunks = 8;               // bytes of one copy, copies of a token's stage
    static constexpr int kChunkInputs = kChunk / sizeof(Input), kDepth = kChunks * kChunkInputs; // inputs of a stage
    static constexpr int kSteps = kRun / kDepth, kStepBlocks = kDepth / kBlock;
    static constexpr int kBlockChunks = kBlock / kChunkInputs;
    static constexpr bool kGrouped = kGroup != kRow, kScalesSums = kGrouped && !Format::kScaledExactly;
    static constexpr int kStepGroups = kGrouped ? (kDepth > kGroup ? kDepth / kGroup : 1) : 0;
    static constexpr int kScaleChunks = kBlockSlabs * kStepGroups * 2;
    // Blocks on a multiprocessor that registers shall leave room for: fewer where sums are kept twice, or where codes
    // and decoded weights together take more registers.
    static constexpr int kResident = !kScalesSums && (sizeof(Words) + sizeof(Format)) * kSlabs <= 96 ? 3 : 2;

    struct Stage
    {
        uint4 tokens[kTokens][kChunks];
        uint4 scales[kScaleChunks ? kScaleChunks : 1];
    };
    struct Results
    {
        half rows[kTokens][kOutputs + 8];
    };
    union Shared
    {
        Stage stages[kStages];
        Results results;
    };

    // Where a token's chunk lies: blocks of a token change places with its number, so that the fragments of eight, or
    // four, tokens lie in different banks.
    static __device__ int placed(int token, int chunk) { return chunk ^ (token * kBlockChunks & (kChunks - 1)); }

    typename Format::Input const* x;
    float const* token_scales;
    Part part;
    int tokens, inputs, groups, runs, first_token, warp, lane;
    int slabs[kSlabs]; // past the last one it is read again, and not written

    __device__ int slab_of(int block, int number) const
    {
        int const wanted = block * kBlockSlabs + number, last = part.outputs / kSlab - 1;
        return wanted < last ? wanted : last;
    }

    __device__ void fetch(Stage& stage, int block, int step) const
    {
        int const chunk = threadIdx.x % kChunks, column = step * kDepth + chunk * kChunkInputs;
        for (int row = threadIdx.x / kChunks; row < kTokens; row += kThreads / kChunks)
        {
            bool const there = first_token + row < tokens && column < inputs;
            size_t const place = there ? size_t(first_token + row) * inputs + column : 0;
            copy_async(&stage.tokens[row][placed(row, chunk)], x + place, there);
        }
        if constexpr (kGrouped)
            for (int item = threadIdx.x; item < kScaleChunks; item += kThreads)
            {
                int const slab = item / (kStepGroups * 2), within = item % (kStepGroups * 2);
                size_t const group = size_t(slab_of(block, slab)) * groups + step * kDepth / kGroup;
                copy_async(&stage.scales[item], reinterpret_cast<uint4 const*>(part.scales) + group * 2 + within, true);
            }
    }

    // The scales of a lane's two outputs of one slab, of the group that holds the stage's block.
    static __device__ uint32_t scale_pair(Stage const& stage, int slab, int block, int lane)
    {
        int const group = kDepth > kGroup ? block * kBlock / (kGrouped ? kGroup : 1) : 0;
        return reinterpret_cast<uint32_t const*>(stage.scales)[(slab * kStepGroups + group) * 8 + lane / 4];
    }

    // One stage, the `step`-th of its run, of all slabs and tokens.
    __device__ void multiply_stage(Stage const& stage, int step, Words const (&words)[kSlabs],
        Sum (&sum)[kScalesSums ? kSlabs : 1][kTiles][4], Sums (&total)[kSlabs][kTiles][4]) const
    {
        char const* const mine = reinterpret_cast<char const*>(stage.tokens[lane / 4]);
        int const turned = placed(lane / 4, 0);
#pragma unroll
        for (int block = 0; block < kStepBlocks; ++block)
        {
            int const in_run = step * kStepBlocks + block;
            Format weights[kSlabs];
#pragma unroll
            for (int slab = 0; slab < kSlabs; ++slab)
            {
                weights[slab] = Format::decoded(words[slab], in_run);
                if constexpr (kGrouped && !kScalesSums)
                    weights[slab].scale(scale_pair(stage, warp * kSlabs + slab, block, lane));
            }
            char const* const from
                = mine + (block * kBlockChunks ^ turned) * kChunk + lane % 4 * int(sizeof(Fragment));
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile)
            {
                Fragment const fragment
                    = *reinterpret_cast<Fragment const*>(from + tile * (kColumns * kChunks * kChunk));
#pragma unroll
                for (int slab = 0; slab < kSlabs; ++slab)
                    if constexpr (kScalesSums)
                        weights[slab].add(sum[slab][tile], fragment);
                    else
                        weights[slab].add(total[slab][tile], fragment);
            }
            if constexpr (kScalesSums)
                if ((in_run + 1) * kBlock % kGroup == 0)
                {
#pragma unroll
                    for (int slab = 0; slab < kSlabs; ++slab)
                    {
                        uint32_t const pair = scale_pair(stage, warp * kSlabs + slab, block, lane);
#pragma unroll
                        for (int tile = 0; tile < kTiles; ++tile)
                            add_group<Format>(total[slab][tile], sum[slab][tile], pair);
                    }
                }
        }
    }

    __device__ void run(int block)
    {
        __shared__ uint4 memory[(sizeof(Shared) + sizeof(uint4) - 1) / sizeof(uint4)];
        Shared& shared = *reinterpret_cast<Shared*>(memory);
        Sums total[kSlabs][kTiles][4] = {};
        Sum sum[kScalesSums ? kSlabs : 1][kTiles][4];
        for (auto& slab : sum)
            for (auto& tile : slab)
                for (auto& place : tile)
                    place = Format::kStart;
        Words words[kSlabs];
        for (int slab = 0; slab < kSlabs; ++slab)
        {
            slabs[slab] = slab_of(block, warp * kSlabs + slab);
            words[slab] = Words::load(part.codes, size_t(slabs[slab]) * runs, lane);
        }
        int const stages = runs * kSteps;
        for (int stage = 0; stage < kStages - 1; ++stage)
        {
            if (stage < stages)
                fetch(shared.stages[stage], block, stage);
            commit_copies();
        }
#pragma unroll 1
        for (int run = 0; run < runs; ++run)
        {
            Words coming[kSlabs];
            for (int slab = 0; slab < kSlabs; ++slab)
                coming[slab] = Words::load(part.codes, size_t(slabs[slab]) * runs + (run + 1 < runs ? run + 1 : run), lane);
#pragma unroll
            for (int step = 0; step < kSteps; ++step)
            {
                int const stage = run * kSteps + step, next = stage + kStages - 1;
                await_copies<kStages - 2>();
                __syncthreads(); // the copies of all threads are there, and nobody reads the stage before any more
                if (next < stages)
                    fetch(shared.stages[next % kStages], block, next);
                commit_copies();
                multiply_stage(shared.stages[stage % kStages], step, words, sum, total);
            }
#pragma unroll
            for (int slab = 0; slab < kSlabs; ++slab)
                words[slab] = coming[slab];
        }
        __syncthreads();
        write(shared.results, block, total);
    }

    // Results go by shared memory, so that whole lines are written.
    __device__ void write(Results& results, int block, Sums const (&total)[kSlabs][kTiles][4]) const
    {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
            for (int place = 0; place < 4; ++place)
            {
                int const row = tile * kColumns + lane % 4 * 2 + place % 2, token = first_token + row;
                int const output = place / 2 * 8 + lane / 4;
                float const unit = Format::kUnit * (token_scales && token < tokens ? token_scales[token] : 1.0f);
#pragma unroll
                for (int slab = 0; slab < kSlabs; ++slab)
                {
                    float const scaled
                        = float(total[slab][tile][place]) * row_scale<kGroup>(part.scales, slabs[slab], output);
                    results.rows[row][(warp * kSlabs + slab) * kSlab + output] = __float2half_rn(scaled * unit);
                }
            }
        __syncthreads();
        constexpr int kWide = kChunk / sizeof(half); // outputs of one store
        for (int item = threadIdx.x; item < kTokens * (kOutputs / kWide); item += kThreads)
        {
            int const row = item / (kOutputs / kWide), column = item % (kOutputs / kWide) * kWide;
            int const token = first_token + row, output = block * kOutputs + column;
            if (token < tokens && output < part.outputs)
                *reinterpret_cast<uint4*>(part.y + size_t(token) * part.outputs + output)
                    = *reinterpret_cast<uint4 const*>(&results.rows[row][column]);
        }
    }
};
