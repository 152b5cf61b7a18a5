// The operators of this library.
#pragma once

#include "ort_abi.h"

extern ort::Op const kQuantizedLinear, kCausalAttention;
