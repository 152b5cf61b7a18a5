// y = x W^T + bias with W in 2, 4 or 8 bits and x rounded to 8 bits while it runs; one copy of W for any number of rows.
//
// x [rows, inputs] float32. codes: see `pack_lanes` of engine_build.packing: outputs in blocks of 16, and there 64 bytes
// after another, each of 4 consecutive inputs of 16 outputs; a byte holds 1, 2 or 4 codes, whose inputs lie 4 apart.
// scales float16 [blocks, groups, 16]. Inputs are rounded per token and group, as MatMulNBits of ONNX Runtime does:
// code = rint(x * (127 / peak)), scale = peak / 127; or, without groups, per token: code = rint(x / (peak / 127)).
//
// One row reads the packed codes as they are. Many rows unpack a block of outputs once, to int8 in the cache, and multiply
// it with AMX tiles where the processor has them, else with VNNI. Sums of a group are exact integers and groups are added
// in one order, so a row's result does not depend on the rows beside it or on which of the three ways was taken.

#include "operators.h"
#include "scratch.h"

#include <algorithm>
#include <cstring>
#include <immintrin.h>
#include <memory>
#include <sys/syscall.h>
#include <unistd.h>
#include <vector>

namespace {

constexpr int kLanes = 16;        // outputs of a vector
constexpr int kQuad = 4;          // inputs that one lane's 32 bits hold
constexpr int kVector = int(kAligned); // bytes
constexpr int kTileInputs = 64;   // of an AMX tile's row
constexpr int kBlocksAtOnce = 4;  // blocks of outputs per piece of work, at most
constexpr int kPieces = 16;       // into which a product is cut at least, so that no thread waits long for the last
constexpr int kFewRows = 4;       // up to here codes are unpacked in registers
constexpr int kAhead = 2048;      // bytes of codes that a row asks for before it needs them
// Up to here one thread is faster than handing a share to others, rows and results included: products of few rows, which
// wait for the weights, of many, which do not, and values to round.
constexpr int64_t kFewAlone = 1 << 18, kManyAlone = 1 << 24, kRoundedAlone = 1 << 17;

struct Sizes {
    int64_t inputs, outputs, group; // group: 0 without groups
    int bits;

    int64_t group_inputs() const { return group ? group : filled(); }
    int64_t filled() const
    {
        int64_t const unit = group ? group : kTileInputs;
        return (inputs + unit - 1) / unit * unit;
    }
    int64_t groups() const { return filled() / group_inputs(); }
    int64_t blocks() const { return (outputs + kLanes - 1) / kLanes; }
    int64_t block_bytes() const { return filled() * kLanes * bits / 8; }
    int zero() const { return 1 << (bits - 1); }
};

// Rows rounded to 8 bits, in the calling thread's memory. sums: of each group's codes.
struct Rows {
    int64_t count, filled, groups;
    std::vector<float> scales; // [count, groups]
    std::vector<int32_t> sums;
    int8_t* first; // [count, filled]

    Rows(int64_t count, Sizes const& sizes)
        : count(count), filled(sizes.filled()), groups(sizes.groups()), scales(count * groups), sums(count * groups)
    {
        thread_local Scratch scratch;
        first = reinterpret_cast<int8_t*>(scratch.of(count * filled));
    }
    int8_t const* row(int64_t index) const { return first + index * filled; }
};

inline __mmask16 tail(int64_t left) { return left >= kLanes ? 0xFFFF : __mmask16((1u << (left > 0 ? left : 0)) - 1); }

void round_row(float const* x, Sizes const& sizes, Rows& rows, int64_t row)
{
    int64_t const group = sizes.group_inputs();
    for (int64_t index = 0; index < rows.groups; ++index) {
        int64_t const begin = index * group;
        // The larger of two, NaN or infinity winning: integers order magnitudes, and hide no damage.
        __m512i largest = _mm512_setzero_si512();
        __m512i const magnitude = _mm512_set1_epi32(0x7FFFFFFF);
        for (int64_t k = begin; k < begin + group; k += kLanes) {
            __m512i const bits = _mm512_castps_si512(_mm512_maskz_loadu_ps(tail(sizes.inputs - k), x + k));
            largest = _mm512_max_epu32(largest, _mm512_and_si512(bits, magnitude));
        }
        uint32_t const top = _mm512_reduce_max_epu32(largest);
        float peak;
        std::memcpy(&peak, &top, sizeof peak);
        float const scale = peak / 127.0f;
        __m512 const factor = _mm512_set1_ps(peak == 0 ? 0.0f : 127.0f / peak);
        __m512 const divisor = _mm512_set1_ps(peak == 0 ? 1.0f : scale);
        __m512i total = _mm512_setzero_si512();
        for (int64_t k = begin; k < begin + group; k += kLanes) {
            __m512 const value = _mm512_maskz_loadu_ps(tail(sizes.inputs - k), x + k);
            __m512 const scaled = sizes.group ? _mm512_mul_ps(value, factor) : _mm512_div_ps(value, divisor);
            __m512i const code = _mm512_cvt_roundps_epi32(scaled, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
            total = _mm512_add_epi32(total, code);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(rows.first + row * rows.filled + k), _mm512_cvtsepi32_epi8(code));
        }
        rows.scales[row * rows.groups + index] = scale;
        rows.sums[row * rows.groups + index] = _mm512_reduce_add_epi32(total);
    }
}

// The 64 bytes' codes number `part`, each in a byte of its own.
template <int Bits>
inline __m512i part_of(__m512i packed, int part)
{
    if constexpr (Bits == 8)
        return packed;
    __m512i const mask = _mm512_set1_epi8(char((1 << Bits) - 1));
    return _mm512_and_si512(part ? _mm512_srli_epi16(packed, part * Bits) : packed, mask);
}

inline __m512 scales_at(uint16_t const* scales) // float16 of 16 outputs
{
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<__m256i const*>(scales)));
}

inline __m512 add_group(__m512 y, __m512i sum, float row_scale, __m512 scale)
{
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(scale, _mm512_set1_ps(row_scale)), y);
}

struct Product {
    Sizes sizes;
    uint8_t const* codes;
    uint16_t const* scales;
    float const* bias; // or null
    float* y;
    Rows const* rows;
    bool tiles;

    __m512 start(int64_t block) const
    {
        int64_t const at = block * kLanes;
        return bias ? _mm512_maskz_loadu_ps(tail(sizes.outputs - at), bias + at) : _mm512_setzero_ps();
    }
    void store(int64_t row, int64_t block, __m512 value) const
    {
        int64_t const at = block * kLanes;
        _mm512_mask_storeu_ps(y + row * sizes.outputs + at, tail(sizes.outputs - at), value);
    }
};

template <int Bits, int Count>
void few_rows(Product const& product, int64_t first, int64_t block)
{
    constexpr int kParts = 8 / Bits;
    Sizes const& sizes = product.sizes;
    Rows const& rows = *product.rows;
    int64_t const group = sizes.group_inputs();
    uint8_t const* packed = product.codes + block * sizes.block_bytes();
    uint16_t const* scales = product.scales + block * rows.groups * kLanes;
    __m512 y[Count];
    for (auto& one : y)
        one = product.start(block);
    for (int64_t index = 0; index < rows.groups; ++index, scales += kLanes) {
        __m512i sums[Count][2] = {};
        for (int64_t k = index * group; k < (index + 1) * group; k += kQuad * kParts, packed += kVector) {
            __m512i const bytes = _mm512_loadu_si512(packed);
            _mm_prefetch(reinterpret_cast<char const*>(packed) + kAhead, _MM_HINT_T0);
            for (int part = 0; part < kParts; ++part) {
                __m512i const weights = part_of<Bits>(bytes, part);
                for (int row = 0; row < Count; ++row) {
                    int32_t four;
                    std::memcpy(&four, rows.row(first + row) + k + part * kQuad, sizeof four);
                    sums[row][part & 1] = _mm512_dpbusd_epi32(sums[row][part & 1], weights, _mm512_set1_epi32(four));
                }
            }
        }
        __m512 const scale = scales_at(scales);
        for (int row = 0; row < Count; ++row) {
            int64_t const at = (first + row) * rows.groups + index;
            __m512i const shift = _mm512_set1_epi32(sizes.zero() * rows.sums[at]);
            __m512i const sum = _mm512_sub_epi32(_mm512_add_epi32(sums[row][0], sums[row][1]), shift);
            y[row] = add_group(y[row], sum, rows.scales[at], scale);
        }
    }
    for (int row = 0; row < Count; ++row)
        product.store(first + row, block, y[row]);
}

// A block's codes as bytes [filled / 4][16 outputs][4 inputs], `shift` taken off.
template <int Bits>
void unpack(Product const& product, int64_t block, int shift, uint8_t* unpacked)
{
    constexpr int kParts = 8 / Bits;
    Sizes const& sizes = product.sizes;
    uint8_t const* packed = product.codes + block * sizes.block_bytes();
    __m512i const zero = _mm512_set1_epi8(char(shift));
    for (int64_t k = 0; k < sizes.filled(); k += kQuad * kParts, packed += kVector) {
        __m512i const bytes = _mm512_loadu_si512(packed);
        for (int part = 0; part < kParts; ++part, unpacked += kVector)
            _mm512_store_si512(unpacked, _mm512_sub_epi8(part_of<Bits>(bytes, part), zero));
    }
}

// `Count` rows with the unpacked unsigned blocks, two at a time.
template <int Count>
void rows_by_vectors(Product const& product, int64_t first, int64_t begin, int64_t end, uint8_t const* unpacked)
{
    Sizes const& sizes = product.sizes;
    Rows const& rows = *product.rows;
    int64_t const group = sizes.group_inputs(), stride = sizes.filled() * kLanes;
    for (int64_t block = begin; block < end; block += 2) {
        int const wide = block + 1 < end ? 2 : 1;
        uint8_t const* const one = unpacked + (block - begin) * stride;
        uint8_t const* const two = wide == 2 ? one + stride : one;
        __m512 y[Count][2];
        for (int row = 0; row < Count; ++row)
            y[row][0] = product.start(block), y[row][1] = product.start(block + wide - 1);
        for (int64_t index = 0; index < rows.groups; ++index) {
            __m512i sums[Count][2] = {};
            for (int64_t k = index * group; k < (index + 1) * group; k += kQuad) {
                __m512i const left = _mm512_load_si512(one + k * kLanes), right = _mm512_load_si512(two + k * kLanes);
                for (int row = 0; row < Count; ++row) {
                    int32_t four;
                    std::memcpy(&four, rows.row(first + row) + k, sizeof four);
                    __m512i const inputs = _mm512_set1_epi32(four);
                    sums[row][0] = _mm512_dpbusd_epi32(sums[row][0], left, inputs);
                    sums[row][1] = _mm512_dpbusd_epi32(sums[row][1], right, inputs);
                }
            }
            uint16_t const* const scales = product.scales + (block * rows.groups + index) * kLanes;
            __m512 const scale[2] = {scales_at(scales), scales_at(scales + (wide - 1) * rows.groups * kLanes)};
            for (int row = 0; row < Count; ++row) {
                int64_t const at = (first + row) * rows.groups + index;
                __m512i const shift = _mm512_set1_epi32(sizes.zero() * rows.sums[at]);
                for (int side = 0; side < 2; ++side)
                    y[row][side] = add_group(
                        y[row][side], _mm512_sub_epi32(sums[row][side], shift), rows.scales[at], scale[side]);
            }
        }
        for (int row = 0; row < Count; ++row)
            for (int side = 0; side < wide; ++side)
                product.store(first + row, block + side, y[row][side]);
    }
}

#define TILED __attribute__((target("amx-tile,amx-int8")))

struct alignas(64) TileShapes {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Sums in tiles 0 and 1 by turns, rows of x in 2, weights in 3. inputs: of a tile's row.
TILED void set_tiles(int count, int inputs)
{
    TileShapes shapes;
    for (int tile : {0, 1, 2})
        shapes.rows[tile] = uint8_t(count);
    shapes.rows[3] = uint8_t(inputs / kQuad);
    shapes.row_bytes[0] = shapes.row_bytes[1] = shapes.row_bytes[3] = kVector;
    shapes.row_bytes[2] = uint16_t(inputs);
    _tile_loadconfig(&shapes);
}

// `there` rows with the unpacked signed blocks: 16 if `Full`, whose results then stay in registers.
template <bool Full>
TILED void rows_by_tiles(
    Product const& product, int64_t first, int there, int64_t begin, int64_t end, uint8_t const* unpacked)
{
    int const count = Full ? kLanes : there;
    Sizes const& sizes = product.sizes;
    Rows const& rows = *product.rows;
    int64_t const group = sizes.group_inputs(), stride = sizes.filled() * kLanes;
    int const width = int(group < kTileInputs ? group : kTileInputs);
    alignas(64) int32_t sums[2][kLanes][kLanes];
    for (int64_t block = begin; block < end; ++block) {
        uint8_t const* const weights = unpacked + (block - begin) * stride;
        __m512 y[kLanes];
#pragma GCC unroll 16
        for (int row = 0; row < count; ++row)
            y[row] = product.start(block);
        for (int64_t index = 0; index < rows.groups; ++index) {
            int32_t(*const here)[kLanes] = sums[index & 1];
            if (index & 1) {
                _tile_zero(1);
                for (int64_t k = index * group; k < (index + 1) * group; k += width) {
                    _tile_loadd(2, rows.row(first) + k, rows.filled);
                    _tile_loadd(3, weights + k * kLanes, kVector);
                    _tile_dpbssd(1, 2, 3);
                }
                _tile_stored(1, here, kVector);
            } else {
                _tile_zero(0);
                for (int64_t k = index * group; k < (index + 1) * group; k += width) {
                    _tile_loadd(2, rows.row(first) + k, rows.filled);
                    _tile_loadd(3, weights + k * kLanes, kVector);
                    _tile_dpbssd(0, 2, 3);
                }
                _tile_stored(0, here, kVector);
            }
            __m512 const scale = scales_at(product.scales + (block * rows.groups + index) * kLanes);
            float const* const row_scales = rows.scales.data() + first * rows.groups + index;
#pragma GCC unroll 16
            for (int row = 0; row < count; ++row)
                y[row] = add_group(y[row], _mm512_load_si512(here[row]), row_scales[row * rows.groups], scale);
        }
#pragma GCC unroll 16
        for (int row = 0; row < count; ++row)
            product.store(first + row, block, y[row]);
    }
}

TILED void many_rows_by_tiles(Product const& product, int64_t begin, int64_t end, uint8_t const* unpacked)
{
    int64_t const count = product.rows->count, group = product.sizes.group_inputs();
    int const width = int(group < kTileInputs ? group : kTileInputs);
    int set = 0;
    for (int64_t first = 0; first < count; first += kLanes) {
        int const here = int(count - first < kLanes ? count - first : kLanes);
        if (here != set)
            set_tiles(set = here, width);
        if (here == kLanes)
            rows_by_tiles<true>(product, first, here, begin, end, unpacked);
        else
            rows_by_tiles<false>(product, first, here, begin, end, unpacked);
    }
    _tile_release();
}

void many_rows_by_vectors(Product const& product, int64_t begin, int64_t end, uint8_t const* unpacked)
{
    constexpr int kRows = 10;
    int64_t const count = product.rows->count;
    int64_t first = 0;
    for (; first + kRows <= count; first += kRows)
        rows_by_vectors<kRows>(product, first, begin, end, unpacked);
    for (; first + 3 <= count; first += 3)
        rows_by_vectors<3>(product, first, begin, end, unpacked);
    for (; first < count; ++first)
        rows_by_vectors<1>(product, first, begin, end, unpacked);
}

template <int Bits>
void multiply_blocks(Product const& product, int64_t begin, int64_t end)
{
    int64_t const count = product.rows->count;
    if (count <= kFewRows) {
        for (int64_t block = begin; block < end; ++block) {
            switch (count) {
            case 1: few_rows<Bits, 1>(product, 0, block); break;
            case 2: few_rows<Bits, 2>(product, 0, block); break;
            case 3: few_rows<Bits, 3>(product, 0, block); break;
            default: few_rows<Bits, 4>(product, 0, block);
            }
        }
        return;
    }
    int64_t const stride = product.sizes.filled() * kLanes;
    thread_local Scratch scratch;
    uint8_t* const unpacked = scratch.of(stride * (end - begin));
    for (int64_t block = begin; block < end; ++block)
        unpack<Bits>(product, block, product.tiles ? product.sizes.zero() : 0, unpacked + (block - begin) * stride);
    if (product.tiles)
        many_rows_by_tiles(product, begin, end, unpacked);
    else
        many_rows_by_vectors(product, begin, end, unpacked);
}

// Whether this process may use AMX tiles; Linux asks to be asked.
bool tiles_allowed()
{
#ifdef WITHOUT_TILES // tests compare both ways
    return false;
#endif
    if (!__builtin_cpu_supports("amx-int8") || !__builtin_cpu_supports("amx-tile"))
        return false;
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

struct QuantizedLinear {
    static constexpr char const* kName = "QuantizedLinear";
    static constexpr size_t kInputs = 4, kOptional = 3, kOutputs = 1;
    static int input_type(size_t index) { return index == 1 ? ort::kUint8 : index == 2 ? ort::kFloat16 : ort::kFloat; }

    ort::Api const* api;
    Sizes sizes;
    bool tiles;

    static ort::Status* create(ort::Api const* api, ort::Info const* info, void** made)
    {
        int64_t bits = 0;
        auto kernel = std::make_unique<QuantizedLinear>(QuantizedLinear{api, {}, tiles_allowed()});
        struct { char const* name; int64_t* value; } const wanted[] = {
            {"K", &kernel->sizes.inputs}, {"N", &kernel->sizes.outputs}, {"block_size", &kernel->sizes.group},
            {"bits", &bits}};
        for (auto const& one : wanted)
            if (auto* failed = api->attribute(info, one.name, one.value))
                return failed;
        kernel->sizes.bits = int(bits);
        if (bits != 2 && bits != 4 && bits != 8)
            return api->error("QuantizedLinear: bits must be 2, 4 or 8");
        if (int64_t const group = kernel->sizes.group; group != 0 && group != 32 && group % kTileInputs)
            return api->error("QuantizedLinear: a group has 32 inputs or a multiple of 64");
        *made = kernel.release();
        return nullptr;
    }

    ort::Status* compute(ort::Context* context) const
    {
        ort::Value const* inputs[4] = {};
        void* contents[4] = {};
        for (size_t index = 0; index < 4; ++index) {
            if (auto* failed = api->input(context, index, &inputs[index]))
                return failed;
            if (inputs[index])
                if (auto* failed = api->data(inputs[index], &contents[index]))
                    return failed;
        }
        size_t rank = 0;
        int64_t dims[ort::kMostSizes] = {};
        if (auto* failed = ort::sizes_of(api, inputs[0], dims, &rank))
            return failed;
        if (rank < 1 || dims[rank - 1] != sizes.inputs)
            return api->error("QuantizedLinear: the last dimension of x is not the layer's inputs");
        int64_t count = 1;
        for (size_t index = 0; index + 1 < rank; ++index)
            count *= dims[index];
        dims[rank - 1] = sizes.outputs;
        ort::Value* result = nullptr;
        void* y = nullptr;
        if (auto* failed = api->output(context, 0, dims, rank, &result))
            return failed;
        if (auto* failed = api->data(result, &y))
            return failed;
        if (count == 0)
            return nullptr;
        Rows rows(count, sizes);
        auto round = [&](size_t piece) {
            int64_t const end = std::min<int64_t>(count, int64_t(piece + 1) * kLanes);
            for (int64_t row = int64_t(piece) * kLanes; row < end; ++row)
                round_row(static_cast<float const*>(contents[0]) + row * sizes.inputs, sizes, rows, row);
        };
        bool const rounds_alone = count * sizes.inputs <= kRoundedAlone;
        if (auto* failed = ort::run_pieces(api, context, rounds_alone, size_t((count + kLanes - 1) / kLanes), round))
            return failed;
        Product const product{sizes, static_cast<uint8_t const*>(contents[1]),
                              static_cast<uint16_t const*>(contents[2]), static_cast<float const*>(contents[3]),
                              static_cast<float*>(y), &rows, tiles};
        int64_t const at_once = std::clamp<int64_t>(sizes.blocks() / kPieces, 1, kBlocksAtOnce);
        auto multiply = [&](size_t piece) {
            int64_t const begin = int64_t(piece) * at_once;
            int64_t const end = std::min<int64_t>(sizes.blocks(), begin + at_once);
            switch (sizes.bits) {
            case 2: multiply_blocks<2>(product, begin, end); break;
            case 4: multiply_blocks<4>(product, begin, end); break;
            default: multiply_blocks<8>(product, begin, end);
            }
        };
        int64_t const most_alone = count <= kFewRows ? kFewAlone : kManyAlone;
        bool const multiplies_alone = count * sizes.inputs * sizes.outputs <= most_alone;
        size_t const pieces = size_t((sizes.blocks() + at_once - 1) / at_once);
        return ort::run_pieces(api, context, multiplies_alone, pieces, multiply);
    }
};

} // namespace

constinit ort::Op const kQuantizedLinear = ort::op_of<QuantizedLinear>();
