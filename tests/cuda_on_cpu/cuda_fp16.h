// The parts of CUDA that the kernels use, on a CPU: a block's threads are fibers that run one after the other, each
// until its next barrier, so that a missing barrier shows as a wrong number. Blocks run one after the other.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#include <ucontext.h>

using std::size_t;

#define __global__
#define __device__
#define __shared__ static
#define __restrict__
#define __launch_bounds__(...)

struct half { uint16_t bits; };

template <typename To, typename From>
inline To as(From value)
{
    static_assert(sizeof(To) == sizeof(From));
    To result;
    std::memcpy(&result, &value, sizeof(To));
    return result;
}

inline float __half2float(half value) { return as<_Float16>(value.bits); }
inline half __float2half_rn(float value) { return {as<uint16_t>(_Float16(value))}; }

struct uint2 { uint32_t x, y; };
struct uint4 { uint32_t x, y, z, w; };
struct Index { int x, y; };

inline Index threadIdx, blockIdx;

namespace cuda_on_cpu
{
constexpr int kWarp = 32;

// Threads of one block, or of one warp, that wait for each other.
struct Barrier
{
    int size = 0, arrived = 0, generation = 0;
};

// 16 bytes on their way to shared memory; zeros if there is no `from`.
struct Copy
{
    void* to;
    void const* from;
};

struct Fiber
{
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    std::deque<std::vector<Copy>> copies{1}; // by group
    bool done = false;
};

struct Warp
{
    Barrier barrier;
    uint32_t a[kWarp][4], b[kWarp][2]; // of a product: registers by lane,
    double rows[16][32], columns[32][8]; // and the matrices that they hold, once a lane has put them together
    bool together = false;
};

inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline Barrier block;
inline std::function<void()> body;

inline void wait(Barrier& barrier)
{
    int const generation = barrier.generation;
    if (++barrier.arrived == barrier.size)
    {
        barrier.arrived = 0;
        ++barrier.generation;
    }
    while (barrier.generation == generation)
        swapcontext(&fibers[threadIdx.x].context, &scheduler);
}

inline void enter()
{
    body();
    fibers[threadIdx.x].done = true;
}

inline void run_block(int threads, bool backwards)
{
    constexpr size_t kStack = 1 << 16;
    fibers.clear();
    fibers.resize(threads);
    warps.assign(threads / kWarp, {});
    block = {threads};
    for (Warp& warp : warps)
        warp.barrier = {kWarp};
    for (Fiber& fiber : fibers)
    {
        fiber.stack.reset(new char[kStack]);
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, enter, 0);
    }
    for (int left = threads; left > 0;)
        for (int place = 0; place < threads; ++place)
        {
            threadIdx.x = backwards ? threads - 1 - place : place;
            Fiber& fiber = fibers[threadIdx.x];
            if (fiber.done)
                continue;
            swapcontext(&scheduler, &fiber.context);
            left -= fiber.done;
        }
}

// `Run<kernel>::call` takes the grid, the block's threads, the order in which they run, and the kernel's arguments.
template <auto Kernel>
struct Run;

template <typename... Arguments, void (*Kernel)(Arguments...)>
struct Run<Kernel>
{
    static void call(int grid_x, int grid_y, int threads, int backwards, Arguments... arguments)
    {
        body = [=] { Kernel(arguments...); };
        for (blockIdx.y = 0; blockIdx.y < grid_y; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < grid_x; ++blockIdx.x)
                run_block(threads, backwards);
    }
};
} // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::wait(cuda_on_cpu::block); }
