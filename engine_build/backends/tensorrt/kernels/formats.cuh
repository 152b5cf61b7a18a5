// What a lane makes of packed codes: fragments of the weights' matrix, in registers, and sums with activations.
//
// `pack_runs` in packing.py has cut the weights into slabs of 16 outputs and runs of 128 inputs, and has put the codes
// of a slab's run in the order in which a warp takes them:
//
//   lane l owns outputs l / 4 and l / 4 + 8, and of every block q = 0..3 of 32 inputs 32 q + 8 (l % 4) .. + 7;
//   2 bits: 16 bytes per lane, two words for either output: word q / 2, from bit 8 (q % 2) on: code 2 i at bit 2 i,
//           code 2 i + 1 at bit 16 + 2 i;
//   4 bits: 16 bytes per lane for the first output, then for all lanes 16 for the second: word q: code b at bit 8 b,
//           code 4 + b at bit 8 b + 4.
//
// So a warp reads whole lines, and activations in their natural order: a lane's inputs of a token lie side by side, and
// one wide load brings as many bytes in as few cycles as ldmatrix would, which wants another order of the inputs.
#pragma once

#include <tensor_core.cuh>

constexpr int kRun = 128;
constexpr int kWarp = 32;
constexpr int kBlock = 32;
constexpr int kBlocks = kRun / kBlock;
constexpr int kSlab = 16;
constexpr int kColumns = 8;
constexpr int kRow = 0; // as a group: all of a row

// fma2's factors and offsets: powers of two, and what has been added to codes with them.
constexpr uint32_t kOne = 0x3C003C00u, kQuarter = 0x34003400u, kSixteenth = 0x2C002C00u, kSixtyFourth = 0x24002400u;

// Two 2-bit codes of `word`, at bits 2 `pair` and 16 + 2 `pair`, as floats -2, -1, 0 or 1. With its sign bit flipped a
// code is itself plus 2. The last places of 1024 hold it, 4^pair times as large; that is undone, and 1024 taken off.
template <int pair>
inline __device__ uint32_t decode(uint32_t word)
{
    constexpr uint32_t kFlipped = 0x64006400u | 0x00020002u << 2 * pair;
    constexpr uint32_t kFactor[] = {kOne, kQuarter, kSixteenth, kSixtyFourth};
    constexpr uint32_t kOffset[] = {0xE402E402u, 0xDC08DC08u, 0xD420D420u, 0xCC80CC80u}; // -(1024 4^-pair + 2)
    return fma2(word & 0x00030003u << 2 * pair ^ kFlipped, kFactor[pair], kOffset[pair]);
}

// The same for 4-bit codes in the lower and upper halves of a word's bytes 0 and 2: floats -8 to 7.
inline __device__ uint32_t decode_lower(uint32_t word)
{
    return fma2(word & 0x000F000Fu ^ 0x64086408u, kOne, 0xE408E408u); // -1032
}

inline __device__ uint32_t decode_upper(uint32_t word)
{
    return fma2(word & 0x00F000F0u ^ 0x64806480u, kSixteenth, 0xD480D480u); // -72
}

// Word `block` of four.
inline __device__ uint32_t word_of(uint4 const& words, int block)
{
    return block < 2 ? (block == 0 ? words.x : words.y) : (block == 2 ? words.z : words.w);
}

// A lane's codes of one slab's run of 4 bits.
struct FourBitWords
{
    uint4 upper, lower;

    static __device__ FourBitWords load(uint4 const* codes, size_t place, int lane)
    {
        uint4 const* run = codes + place * (2 * kWarp);
        return {run[lane], run[kWarp + lane]};
    }
};

struct TwoBitWords
{
    uint4 both;

    static __device__ TwoBitWords load(uint4 const* codes, size_t place, int lane)
    {
        return {codes[place * kWarp + lane]};
    }
};

// Weights of one block as float16, and float16 activations.
struct HalfWeights
{
    using Input = half;
    using Sum = float;
    using Fragment = uint4; // a lane's eight activations of one block and token
    static constexpr float kUnit = 1.0f;
    static constexpr float kStart = 0; // of a group's sum
    uint32_t weights[2][4];

    __device__ void add(Sum (&sum)[4], Fragment const& x) const
    {
        multiply(sum, weights[0], x.x, x.y);
        multiply(sum, weights[1], x.z, x.w);
    }

    // Times the scales of the lane's two outputs.
    __device__ void scale(uint32_t pair)
    {
        uint32_t const upper = pick_bytes(pair, 0x1010), lower = pick_bytes(pair, 0x3232);
        for (auto& half_block : weights)
            for (int place = 0; place < 4; ++place)
                half_block[place] = mul2(half_block[place], place % 2 ? lower : upper);
    }

    static __device__ float value(Sum sum) { return sum; }
};

// 2-bit weights, float16 activations. A scale times -2, -1, 0 or 1 is exact in float16, so that weights can be scaled
// before they are multiplied; `build` refuses a scale that would overflow.
struct TwoBit : HalfWeights
{
    using Words = TwoBitWords;
    static constexpr bool kScaledExactly = true;

    __device__ static TwoBit decoded(Words const& words, int block)
    {
        uint32_t const up = (block < 2 ? words.both.x : words.both.y) >> 8 * (block % 2);
        uint32_t const low = (block < 2 ? words.both.z : words.both.w) >> 8 * (block % 2);
        return {{{{decode<0>(up), decode<0>(low), decode<1>(up), decode<1>(low)},
            {decode<2>(up), decode<2>(low), decode<3>(up), decode<3>(low)}}}};
    }
};

// 4-bit weights, float16 activations. Sums are scaled, in float32: scaled weights would be rounded.
struct FourBitHalf : HalfWeights
{
    using Words = FourBitWords;
    static constexpr bool kScaledExactly = false;

    __device__ static FourBitHalf decoded(Words const& words, int block)
    {
        uint32_t const up = word_of(words.upper, block), low = word_of(words.lower, block);
        uint32_t const up0 = pick_bytes(up, 0x4140), up1 = pick_bytes(up, 0x4342);
        uint32_t const low0 = pick_bytes(low, 0x4140), low1 = pick_bytes(low, 0x4342);
        return {{{{decode_lower(up0), decode_lower(low0), decode_lower(up1), decode_lower(low1)},
            {decode_upper(up0), decode_upper(low0), decode_upper(up1), decode_upper(low1)}}}};
    }
};

// 4-bit weights, 8-bit activations. A group's sum starts at the bits of 1.5 * 2^23: while it is below 2^22 (16 * 8 *
// 127 for each of at most 128 inputs), its bits are those of a float32 that is 1.5 * 2^23 larger than it.
struct FourBit
{
    using Input = int8_t;
    using Sum = int32_t;
    using Fragment = uint2;
    using Words = FourBitWords;
    static constexpr bool kScaledExactly = false;
    static constexpr float kUnit = 1.0f / 16; // codes stay in the upper half of their bytes: sixteen times their value
    static constexpr int32_t kStart = 0x4B400000;
    uint32_t weights[4];

    __device__ static FourBit decoded(Words const& words, int block)
    {
        uint32_t const up = word_of(words.upper, block), low = word_of(words.lower, block);
        return {{up << 4 & 0xF0F0F0F0u, low << 4 & 0xF0F0F0F0u, up & 0xF0F0F0F0u, low & 0xF0F0F0F0u}};
    }

    __device__ void add(Sum (&sum)[4], Fragment const& x) const { multiply(sum, weights, x.x, x.y); }

    __device__ void scale(uint32_t) {} // integers are not

    static __device__ float value(Sum sum) { return as_float(sum) - 12582912.0f; }
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

// total += a group's sum times the scales of the lane's two outputs; the next group's starts.
template <typename Format>
inline __device__ void add_group(float (&total)[4], typename Format::Sum (&sum)[4], uint32_t pair)
{
    float const scale[2] = {low_half(pair), low_half(pair >> 16)};
    for (int place = 0; place < 4; ++place)
    {
        total[place] += Format::value(sum[place]) * scale[place / 2];
        sum[place] = Format::kStart;
    }
}

// One of the matrices that a launch multiplies its tokens by.
struct Part
{
    uint4 const* codes;
    uint32_t const* scales;
    int outputs;
    half* y;
};

// The part that a thread block works on; `block`, counted over all parts, becomes its own number in it.
template <int kParts>
inline __device__ Part part_of(Part const (&parts)[kParts], int block_outputs, int& block)
{
    Part chosen = parts[0];
    int before = 0, mine = block;
#pragma unroll
    for (int part = 1; part < kParts; ++part)
    {
        before += (parts[part - 1].outputs + block_outputs - 1) / block_outputs;
        if (block >= before)
        {
            chosen = parts[part];
            mine = block - before;
        }
    }
    block = mine;
    return chosen;
}
