// Attention of new rows to a growing cache and to each other: turns queries and keys, extends the cache, softmax, mixes.
//
// query [1, rows, heads * size], key and value [1, rows, shared * size]; past_key and past_value [1, shared, past, size];
// cosine and sine [places, size / 2]. Gives mixed [1, rows, heads * size] and the cache with the new rows. float32.
//
// A query's score of a key, softmax(q k / sqrt(size)), and the mixture are summed in the order of `size` and of keys, so
// a row's result depends neither on the rows beside it nor on threads, and a row by itself has the bits that it has in a
// prompt.

#include "operators.h"
#include "scratch.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <immintrin.h>
#include <limits>

namespace {

constexpr int kLanes = 16;          // values of a vector, keys that are scored at once
constexpr int kRows = 8;            // queries at once: enough sums in flight
constexpr int64_t kAlone = 1 << 21; // products up to which one thread is faster than handing a share to others

// e^x of x <= 0: 2^n e^r with |r| <= ln 2 / 2, whose series of 8 terms is exact to 6e-9. NaN stays.
inline __m512 exponential(__m512 x)
{
    x = _mm512_max_ps(_mm512_set1_ps(-100.0f), x); // of NaN and a number the second
    __m512 const n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x); // ln 2 in two parts, the first exact times n
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 sum = _mm512_set1_ps(1.0f / 5040);
    for (float const term : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 1.0f / 2, 1.0f, 1.0f})
        sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(term));
    return _mm512_scalef_ps(sum, n);
}

struct Sizes {
    int64_t heads, shared, rows, past, size;

    int64_t total() const { return past + rows; }
    int64_t groups() const { return (total() + kLanes - 1) / kLanes; }
};

struct Attention {
    Sizes sizes;
    float const *query, *key, *value, *past_key, *past_value, *cosine, *sine;
    float *mixed, *all_keys, *all_values;

    // Llama's rotation by halves, for a row at `place`.
    void turn(float const* x, int64_t place, float factor, float* y) const
    {
        int64_t const half = sizes.size / 2;
        float const *c = cosine + place * half, *s = sine + place * half;
        for (int64_t index = 0; index < half; ++index) {
            float const first = x[index], second = x[index + half];
            y[index] = (first * c[index] - second * s[index]) * factor;
            y[index + half] = (second * c[index] + first * s[index]) * factor;
        }
    }

    // One head of keys and values, and the heads of queries that share it.
    void head(int64_t shared) const
    {
        int64_t const size = sizes.size, total = sizes.total(), groups = sizes.groups();
        float* const keys = all_keys + shared * total * size;
        float* const values = all_values + shared * total * size;
        size_t const before = size_t(sizes.past * size) * sizeof(float);
        std::memcpy(keys, past_key + shared * sizes.past * size, before);
        std::memcpy(values, past_value + shared * sizes.past * size, before);
        for (int64_t row = 0; row < sizes.rows; ++row) {
            int64_t const from = (row * sizes.shared + shared) * size, to = (sizes.past + row) * size;
            turn(key + from, sizes.past + row, 1, keys + to);
            std::memcpy(values + to, value + from, size_t(size) * sizeof(float));
        }
        thread_local Scratch scratch;
        int64_t const floats = (groups * size + kRows * groups + kRows * size / kLanes) * kLanes;
        float* const columns = reinterpret_cast<float*>(scratch.of(floats * int64_t(sizeof(float))));
        float* const scores = columns + groups * size * kLanes;
        float* const turned = scores + kRows * groups * kLanes;
        transpose(keys, columns);
        int64_t const queries = sizes.heads / sizes.shared;
        for (int64_t head = shared * queries; head < (shared + 1) * queries; ++head) {
            if (sizes.rows == 1)
                block<1>(head, 0, columns, values, scores, turned);
            else
                for (int64_t row = 0; row < sizes.rows; row += kRows)
                    block<kRows>(head, row, columns, values, scores, turned);
        }
    }

    // [groups, size, 16 keys]
    void transpose(float const* keys, float* columns) const
    {
        __m512i const lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        __m512i const places = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(int(sizes.size)));
        for (int64_t first = 0; first < sizes.total(); first += kLanes) {
            __mmask16 const there = lanes_below(sizes.total() - first);
            for (int64_t index = 0; index < sizes.size; ++index, columns += kLanes)
                _mm512_store_ps(columns, _mm512_mask_i32gather_ps(_mm512_setzero_ps(), there, places,
                                                                  keys + first * sizes.size + index, sizeof(float)));
        }
    }

    static __mmask16 lanes_below(int64_t count)
    {
        return count >= kLanes ? 0xFFFF : __mmask16((1u << (count > 0 ? count : 0)) - 1);
    }

    // Rows from `first` on, `Rows` of them or as many as there are.
    template <int Rows>
    void block(int64_t head, int64_t first, float const* columns, float const* values, float* scores, float* turned) const
    {
        int64_t const size = sizes.size, count = std::min<int64_t>(Rows, sizes.rows - first);
        int64_t const seen = sizes.past + first + count, groups = (seen + kLanes - 1) / kLanes;
        int64_t const stride = sizes.groups() * kLanes;
        float const factor = 1 / std::sqrt(float(size));
        for (int64_t row = 0; row < Rows; ++row) // rows that are not there repeat the last, and are not stored
            turn(query + ((first + std::min(row, count - 1)) * sizes.heads + head) * size,
                 sizes.past + first + std::min(row, count - 1), factor, turned + row * size);
        for (int64_t group = 0; group < groups; ++group) {
            __m512 sums[Rows] = {};
            float const* column = columns + group * size * kLanes;
            for (int64_t index = 0; index < size; ++index, column += kLanes) {
                __m512 const keys = _mm512_load_ps(column);
                for (int row = 0; row < Rows; ++row)
                    sums[row] = _mm512_fmadd_ps(_mm512_set1_ps(turned[row * size + index]), keys, sums[row]);
            }
            for (int row = 0; row < Rows; ++row)
                _mm512_store_ps(scores + row * stride + group * kLanes, sums[row]);
        }
        float shares[Rows];
        for (int row = 0; row < Rows; ++row)
            shares[row] = 1 / weigh(scores + row * stride, groups, sizes.past + first + std::min<int64_t>(row, count - 1) + 1);
        int64_t index = 0;
        for (; index + 2 * kLanes <= size; index += 2 * kLanes)
            mix<Rows, 2>(head, first, count, seen, index, values, scores, stride, shares);
        if (index < size)
            mix<Rows, 1>(head, first, count, seen, index, values, scores, stride, shares);
    }

    // Scores of the first `seen` keys become e^(score - largest), others zero; returns their sum.
    static float weigh(float* scores, int64_t groups, int64_t seen)
    {
        __m512 largest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
        for (int64_t group = 0; group < groups; ++group)
            largest = _mm512_mask_max_ps(largest, lanes_below(seen - group * kLanes), largest,
                                         _mm512_load_ps(scores + group * kLanes));
        __m512 const top = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
        __m512 sum = _mm512_setzero_ps();
        for (int64_t group = 0; group < groups; ++group) {
            float* const here = scores + group * kLanes;
            __m512 const weights = _mm512_maskz_mov_ps(
                lanes_below(seen - group * kLanes), exponential(_mm512_sub_ps(_mm512_load_ps(here), top)));
            _mm512_store_ps(here, weights);
            sum = _mm512_add_ps(sum, weights);
        }
        return _mm512_reduce_add_ps(sum);
    }

    // `Wide` vectors of the mixture, from `index` on.
    template <int Rows, int Wide>
    void mix(int64_t head, int64_t first, int64_t count, int64_t seen, int64_t index, float const* values,
             float const* weights, int64_t stride, float const* shares) const
    {
        __m512 sums[Rows][Wide] = {};
        for (int64_t place = 0; place < seen; ++place)
            for (int part = 0; part < Wide; ++part) {
                __m512 const value = _mm512_loadu_ps(values + place * sizes.size + index + part * kLanes);
                for (int row = 0; row < Rows; ++row)
                    sums[row][part] = _mm512_fmadd_ps(_mm512_set1_ps(weights[row * stride + place]), value, sums[row][part]);
            }
        for (int row = 0; row < Rows && row < count; ++row)
            for (int part = 0; part < Wide; ++part)
                _mm512_storeu_ps(mixed + ((first + row) * sizes.heads + head) * sizes.size + index + part * kLanes,
                                 _mm512_mul_ps(sums[row][part], _mm512_set1_ps(shares[row])));
    }
};

struct CausalAttention {
    static constexpr char const* kName = "CausalAttention";
    static constexpr size_t kInputs = 7, kOptional = 7, kOutputs = 3;
    static int input_type(size_t) { return ort::kFloat; }

    ort::Api const* api;
    int64_t heads, shared;

    static ort::Status* create(ort::Api const* api, ort::Info const* info, void** made)
    {
        auto kernel = std::make_unique<CausalAttention>(CausalAttention{api, 0, 0});
        if (auto* failed = api->attribute(info, "num_heads", &kernel->heads))
            return failed;
        if (auto* failed = api->attribute(info, "kv_num_heads", &kernel->shared))
            return failed;
        if (kernel->shared < 1 || kernel->heads < 1 || kernel->heads % kernel->shared)
            return api->error("CausalAttention: num_heads must be a multiple of kv_num_heads");
        *made = kernel.release();
        return nullptr;
    }

    ort::Status* compute(ort::Context* context) const
    {
        float const* contents[kInputs] = {};
        int64_t dims[kInputs][ort::kMostSizes] = {};
        size_t ranks[kInputs] = {};
        for (size_t index = 0; index < kInputs; ++index) {
            ort::Value const* value = nullptr;
            void* content = nullptr;
            if (auto* failed = api->input(context, index, &value))
                return failed;
            if (auto* failed = api->data(value, &content))
                return failed;
            if (auto* failed = ort::sizes_of(api, value, dims[index], &ranks[index]))
                return failed;
            contents[index] = static_cast<float const*>(content);
        }
        Sizes const sizes{heads, shared, dims[0][1], dims[3][2], dims[3][3]};
        auto is = [&](size_t index, std::initializer_list<int64_t> wanted) {
            return ranks[index] == wanted.size() && std::equal(wanted.begin(), wanted.end(), dims[index]);
        };
        bool fit = is(0, {1, sizes.rows, heads * sizes.size}) && sizes.size % kLanes == 0;
        for (size_t index : {1, 2})
            fit = fit && is(index, {1, sizes.rows, shared * sizes.size}) && is(index + 2, {1, shared, sizes.past, sizes.size});
        if (!fit)
            return api->error("CausalAttention: queries, keys, values and cache do not fit, or a head is no multiple of 16");
        for (size_t index : {5, 6})
            if (ranks[index] != 2 || dims[index][0] < sizes.total() || dims[index][1] * 2 != sizes.size)
                return api->error("CausalAttention: the sequence is longer than the tables of cosine and sine");
        float* results[kOutputs] = {};
        int64_t const wanted[kOutputs][4] = {{1, sizes.rows, heads * sizes.size}, {1, shared, sizes.total(), sizes.size},
                                             {1, shared, sizes.total(), sizes.size}};
        for (size_t index = 0; index < kOutputs; ++index) {
            ort::Value* value = nullptr;
            void* content = nullptr;
            if (auto* failed = api->output(context, index, wanted[index], index ? 4 : 3, &value))
                return failed;
            if (auto* failed = api->data(value, &content))
                return failed;
            results[index] = static_cast<float*>(content);
        }
        if (sizes.rows == 0)
            return api->error("CausalAttention: no rows");
        Attention const attention{sizes, contents[0], contents[1], contents[2], contents[3], contents[4],
                                  contents[5], contents[6], results[0], results[1], results[2]};
        auto work = [&](size_t piece) { attention.head(int64_t(piece)); };
        bool const alone = sizes.rows * sizes.total() * heads * sizes.size <= kAlone;
        return ort::run_pieces(api, context, alone, size_t(shared), work);
    }
};

} // namespace

constinit ort::Op const kCausalAttention = ort::op_of<CausalAttention>();
