// What the recurrent product multiplies: one struct per kind of operand, a template parameter of the
// persistent kernels. All of them share one geometry. A step of K is 32 bytes per row: 16 values of 16 bits
// or 8 of 32. A tile of weights is 16 rows by one step, 512 bytes; a tile of the other operand is 8 sequences
// by one step.
#pragma once

#include "primitives/copy.h"
#include "primitives/math.h"
#include "primitives/mma.h"
#include "primitives/numbers.h"

namespace fusedrnn::cuda {

using namespace device;

// The words of one lane of a weight tile. `at(row, k)` is the weight there. K is counted so that the two
// words of a lane's B fragment are 8 neighbouring bytes of its row: tensor cores add over K in any order, if
// A and B agree. With g = lane / 4 and q = lane % 4, words 0 and 1 are of rows g and g + 8 at byte 8q, 2 and
// 3 at 8q + 4.
template <class E>
struct Words16 {
  using Element = E;
  using Value = Fast;
  static constexpr bool kTensorCore = true;
  static constexpr int kStep = 16;

  template <class At>
  FUSEDRNN_DEVICE static uint32_t word(int lane, int w, At at) {
    const int row = lane / 4 + 8 * (w & 1), k = 4 * (lane % 4) + 2 * (w >> 1);
    return at(row, k).bits | uint32_t{at(row, k + 1).bits} << 16;
  }
  FUSEDRNN_DEVICE static E operand(float x) { return narrow<E>(x); }
};

struct BFloat16Operand : Words16<BFloat16> {
  FUSEDRNN_DEVICE static void mma(float (&d)[4], const FragmentA& a, const FragmentB& b) {
    mma_bf16(d, a, b);
  }
};

struct HalfOperand : Words16<Half> {
  FUSEDRNN_DEVICE static void mma(float (&d)[4], const FragmentA& a, const FragmentB& b) {
    mma_fp16(d, a, b);
  }
};

struct Tf32Operand {
  using Element = float;
  using Value = Fast;
  static constexpr bool kTensorCore = true;
  static constexpr int kStep = 8;

  template <class At>
  FUSEDRNN_DEVICE static uint32_t word(int lane, int w, At at) {
    return bits_of(round_tf32(at(lane / 4 + 8 * (w & 1), 2 * (lane % 4) + (w >> 1))));
  }
  FUSEDRNN_DEVICE static float operand(float x) { return round_tf32(x); }
  FUSEDRNN_DEVICE static void mma(float (&d)[4], const FragmentA& a, const FragmentB& b) {
    mma_tf32(d, a, b);
  }
};

// ieee fp32: no tensor core multiplies it. A lane needs whole rows, so a tile lies in shared memory as
// [16 rows][8].
struct FloatOperand {
  using Element = float;
  using Value = float;
  static constexpr bool kTensorCore = false;
  static constexpr int kStep = 8;

  template <class At>
  FUSEDRNN_DEVICE static uint32_t word(int lane, int w, At at) {
    return bits_of(at(lane / 2, lane % 2 * 4 + w));
  }
  FUSEDRNN_DEVICE static float operand(float x) { return x; }
};

FUSEDRNN_DEVICE float value_of(float x) { return x; }
FUSEDRNN_DEVICE float value_of(Fast x) { return x.value; }

}  // namespace fusedrnn::cuda
