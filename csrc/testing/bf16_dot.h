// VDPBF16PS, the instruction of AVX512-BF16 that the CPU kernels are made of, on a processor that has AVX-512
// but lacks it: so that the machine code that others run is executed by the tests.
#pragma once

#include <array>
#include <cstdint>
#include <span>

namespace fusedrnn {

// From now on, threads of this process that meet the instruction go on as if the processor had it. Only what
// compilers make of the 512-bit form is known, unmasked; anything else ends the process, as it would have.
void emulate_bf16_dot();

// How many were emulated.
int64_t bf16_dots();

// The instruction by itself, in every form of its operands: 16 floats, and twice 16 pairs of bfloat16, as
// bits.
using DotLanes = std::array<uint32_t, 16>;
struct DotForm {
  const char* name;
  void (*run)(uint32_t* sum, const uint32_t* a, const uint32_t* b);
};
std::span<const DotForm> dot_forms();

}  // namespace fusedrnn
