// The one kernel that the -D options choose, callable as `run`.
#include "cuda_fp16.h"

#include SOURCE

extern "C"
{
    auto run = &cuda_on_cpu::Run<NAME>::call;
}
