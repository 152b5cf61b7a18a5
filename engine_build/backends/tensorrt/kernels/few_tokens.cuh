// The products for a decode step.
#pragma once

#include <formats.cuh>

// sum += one run, of rows whose groups are scaled one after the other.
template <typename Format, int kGroup>
inline __device__ void add_scaled_run(float (&total)[4], typename Format::Words const& words,
    uint32_t const (&pairs)[kRun / kGroup], typename Format::Fragment const (&x)[kBlocks])
{
    typename Format::Sum sum[4] = {Format::kStart, Format::kStart, Format::kStart, Format::kStart};
#pragma unroll
    for (int block = 0; block < kBlocks; ++block)
    {
        Format::decoded(words, block).add(sum, x[block]);
        if ((block + 1) * kBlock % kGroup == 0)
            add_group<Format>(total, sum, pairs[block * kBlock / kGroup]);
    }
}

// One thread block computes 16 outputs of 8 tokens; its warps share the runs, each kAhead at a time, all of whose loads
// are on their way before the first is used. token_scales: null for float activations. block: a slab of the part.
template <typename Format, int kGroup, int kAhead, int kThreads>
__device__ void few_tokens(typename Format::Input const* __restrict__ x, float const* __restrict__ token_scales,
    Part const& part, int slab, int tokens, int inputs, int groups)
{
    using Fragment = typename Format::Fragment;
    constexpr int kWarps = kThreads / kWarp;
    int const warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    int const token = blockIdx.y * kColumns + lane / 4;
    int const runs = (inputs + kRun - 1) / kRun;
    typename Format::Input const* const mine = x + size_t(token) * inputs + lane % 4 * 8;

    using Sums = typename Total<Format, kGroup>::Type;
    Sums total[4] = {};
    for (int first = warp; first < runs; first += kWarps * kAhead)
    {
        typename Format::Words words[kAhead];
        Fragment fragments[kAhead][kBlocks];
        for (int ahead = 0; ahead < kAhead; ++ahead)
        {
            int const run = first + ahead * kWarps;
            words[ahead] = {};
            if (run < runs)
                words[ahead] = Format::Words::load(part.codes, size_t(slab) * runs + run, lane);
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
            if constexpr (kGroup == kRow)
            {
#pragma unroll
                for (int block = 0; block < kBlocks; ++block)
                    Format::decoded(words[ahead], block).add(total, fragments[ahead][block]);
            }
            else
            {
                constexpr int kCount = kRun / kGroup;
                int const run = first + ahead * kWarps < runs ? first + ahead * kWarps : first;
                uint32_t pairs[kCount];
                for (int group = 0; group < kCount; ++group)
                    pairs[group] = part.scales[(size_t(slab) * groups + run * kCount + group) * 8 + lane / 4];
                add_scaled_run<Format, kGroup>(total, words[ahead], pairs, fragments[ahead]);
            }
        }
    }

    __shared__ Sums sums[kWarps][kColumns][kSlab];
    for (int place = 0; place < 4; ++place)
        sums[warp][lane % 4 * 2 + place % 2][place / 2 * 8 + lane / 4] = total[place];
    __syncthreads();
    for (int item = threadIdx.x; item < kColumns * kSlab; item += kThreads)
    {
        int const output = item % kSlab, column = item / kSlab, owner = blockIdx.y * kColumns + column;
        if (owner >= tokens)
            continue;
        Sums value = 0;
        for (int warps = 0; warps < kWarps; ++warps)
            value += sums[warps][column][output];
        float const unit = Format::kUnit * (token_scales ? token_scales[owner] : 1.0f);
        float const scaled = float(value) * row_scale<kGroup>(part.scales, slab, output);
        part.y[size_t(owner) * part.outputs + slab * kSlab + output] = __float2half_rn(scaled * unit);
    }
}
