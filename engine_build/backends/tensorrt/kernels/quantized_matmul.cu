// y = x W^T for weights of 2 and 4 bits with float16 activations, and of 4 bits with 8-bit activations, on tensor cores.
//
// Weights are the 16 rows of an mma, tokens its 8 columns. `few_tokens` is for decode steps, `many_tokens` for prompts;
// both read the same packed codes, whose order is at the head of formats.cuh. No mma spans two scales. Sums are float32
// (exact int32 within a group for 8-bit activations).
//
// A launch multiplies its tokens by PARTS matrices of one format, group and input, each with a result of its own: q, k
// and v, or gate and up. Thread blocks are shared out over the parts, one after the other.
//
// Outputs of a part are filled up to whole slabs and inputs to whole runs with zero codes and zero scales. `inputs` is a
// multiple of 8, so that every token is aligned; tokens may be any number. GROUP: inputs per scale, 32, 64 or 128, or 0
// for one scale per row: then sums go on over the whole row, exactly in int32 (16 * 8 * 127 per input: up to 132,000
// inputs), and are scaled once. `groups`: scales of a row.
//
// One entry point per compilation, as `Kernel` in this folder's __init__.py says. Parameters are in TensorRT's order:
// inputs, numbers, outputs. Grid: outputs of all parts, then tokens.

#include <few_tokens.cuh>
#include <many_tokens.cuh>

#if PARTS == 1
#define MATRICES uint4 const *codes0, uint32_t const *scales0
#define OUTPUTS int outputs0
#define RESULTS half* y0
#define ALL_PARTS {{codes0, scales0, outputs0, y0}}
#elif PARTS == 2
#define MATRICES uint4 const *codes0, uint32_t const *scales0, uint4 const *codes1, uint32_t const *scales1
#define OUTPUTS int outputs0, int outputs1
#define RESULTS half *y0, half *y1
#define ALL_PARTS {{codes0, scales0, outputs0, y0}, {codes1, scales1, outputs1, y1}}
#else
#define MATRICES                                                                                                       \
    uint4 const *codes0, uint32_t const *scales0, uint4 const *codes1, uint32_t const *scales1, uint4 const *codes2,   \
        uint32_t const *scales2
#define OUTPUTS int outputs0, int outputs1, int outputs2
#define RESULTS half *y0, half *y1, half *y2
#define ALL_PARTS {{codes0, scales0, outputs0, y0}, {codes1, scales1, outputs1, y1}, {codes2, scales2, outputs2, y2}}
#endif

#if defined(W4A8)
#define INPUTS int8_t const *x, float const *token_scales
#define TOKEN_SCALES token_scales
#else
#define INPUTS half const* x
#define TOKEN_SCALES nullptr
#endif

#if defined(W2A16)
using Weights = TwoBit;
#elif defined(W4A16)
using Weights = FourBitHalf;
#else
using Weights = FourBit;
#endif

#if defined(FEW)
constexpr int kResident = 1;
#else
using Product = ManyTokens<Weights, GROUP, TOKENS, SLABS, STAGES, THREADS>;
constexpr int kResident = Product::kResident;
#endif

extern "C" __global__ void __launch_bounds__(THREADS, kResident)
    NAME(INPUTS, MATRICES, int tokens, int inputs, int groups, OUTPUTS, RESULTS)
{
    Part const parts[] = ALL_PARTS;
    int block = blockIdx.x;
    Part const part = part_of(parts, BLOCK_OUTPUTS, block);
#if defined(FEW)
    few_tokens<Weights, GROUP, AHEAD, THREADS>(x, TOKEN_SCALES, part, block, tokens, inputs, groups);
#else
    int const runs = (inputs + kRun - 1) / kRun, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    Product{x, TOKEN_SCALES, part, tokens, inputs, groups, runs, int(blockIdx.y) * TOKENS, warp, lane, {}}.run(block);
#endif
}
