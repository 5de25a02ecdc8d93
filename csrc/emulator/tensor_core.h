// The matrix product of a warp, given the fragments of all its lanes.
#pragma once

#include <bit>
#include <cstdint>

#include "runtime.h"

namespace fusedrnn::emulator {

struct Fragments {
  const uint32_t* a;  // [4]
  const uint32_t* b;  // [2]
  float* d;           // [4]
};

// Without the compiler's own conversion, which is a call on a processor that has no instruction for it.
inline float widen_half(uint32_t bits) {
  const uint32_t magnitude = bits & 0x7fff, sign = (bits & 0x8000) << 16;
  // Scaling by 2^112 moves the exponent's bias, and makes subnormals normal.
  const float finite = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  const uint32_t value = magnitude < 0x7c00 ? std::bit_cast<uint32_t>(finite) : magnitude << 13 | 0x7f800000;
  return std::bit_cast<float>(value | sign);
}

// Element `i` of a word of operands.
template <Format kFormat>
float operand(uint32_t word, int i) {
  if constexpr (kFormat == Format::kTf32) return std::bit_cast<float>(word & ~0x1fffu);
  const uint32_t bits = i ? word >> 16 : word & 0xffff;
  return kFormat == Format::kHalf ? widen_half(bits) : std::bit_cast<float>(bits << 16);
}

// D += A B. Layouts as in the PTX ISA 8.8, section 9.7.14.5.8 (m16n8k16, 16-bit types) and 9.7.14.5.7
// (m16n8k8, tf32): with g = lane / 4 and q = lane % 4, word w of A holds row g + 8 (w % 2), word w of B
// column g; a word holds the values of K from kPacked * (q + 4h) on, where h is w / 2 for A and w for B. Sums
// are fp32, in the order of K: the real one is not specified.
template <Format kFormat>
void multiply(const Fragments (&lanes)[32]) {
  constexpr int kPacked = kFormat == Format::kTf32 ? 1 : 2, kDepth = 8 * kPacked;
  float a[16][kDepth], b[kDepth][8], d[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, q = lane % 4;
    for (int w = 0; w < 4; ++w)
      for (int i = 0; i < kPacked; ++i)
        a[g + 8 * (w % 2)][kPacked * (q + 4 * (w / 2)) + i] = operand<kFormat>(lanes[lane].a[w], i);
    for (int w = 0; w < 2; ++w)
      for (int i = 0; i < kPacked; ++i)
        b[kPacked * (q + 4 * w) + i][g] = operand<kFormat>(lanes[lane].b[w], i);
    for (int i = 0; i < 4; ++i) d[g + 8 * (i / 2)][2 * q + i % 2] = lanes[lane].d[i];
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < kDepth; ++k)
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i) lanes[lane].d[i] = d[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
}

inline void multiply(Format format, const Fragments (&lanes)[32]) {
  switch (format) {
    case Format::kBFloat16:
      return multiply<Format::kBFloat16>(lanes);
    case Format::kHalf:
      return multiply<Format::kHalf>(lanes);
    case Format::kTf32:
      return multiply<Format::kTf32>(lanes);
  }
}

}  // namespace fusedrnn::emulator
