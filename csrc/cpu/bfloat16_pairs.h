// Pairs of bfloat16 as operands of products, by AVX512-BF16: one instruction adds both products of a pair to
// a float. It takes subnormal factors and sums as zero.
#pragma once

#include "product.h"

namespace fusedrnn::FUSEDRNN_ISA {

struct BFloat16Pair {
  uint32_t bits;  // the first value is the lower half
};

template <>
inline constexpr int kValuesOf<BFloat16Pair> = 2;

template <>
struct VectorOf<BFloat16Pair> {
  using Lanes = Int32s;
};

template <>
struct Simd<BFloat16Pair> {
  static constexpr int kWidth = kVectorBytes / sizeof(BFloat16Pair);
  Int32s v;

  Simd() = default;
  FUSEDRNN_HD explicit Simd(__m512i raw) : v(reinterpret_cast<Int32s>(raw)) {}
  FUSEDRNN_HD explicit Simd(BFloat16Pair s) : Simd(_mm512_set1_epi32(static_cast<int32_t>(s.bits))) {}
  FUSEDRNN_HD static Simd load(const BFloat16Pair* p) { return Simd(_mm512_loadu_si512(p)); }
  FUSEDRNN_HD void store(BFloat16Pair* p) const { _mm512_storeu_si512(p, reinterpret_cast<__m512i>(v)); }

  // The first n lanes; the others are zero.
  FUSEDRNN_HD static Simd load(const BFloat16Pair* p, int n) {
    return Simd(_mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << n) - 1), p));
  }
  FUSEDRNN_HD void store(BFloat16Pair* p, int n) const {
    _mm512_mask_storeu_epi32(p, static_cast<__mmask16>((1u << n) - 1), reinterpret_cast<__m512i>(v));
  }

  // Of values one after another; here n counts these.
  FUSEDRNN_HD static Simd load(const BFloat16* p) { return Simd(_mm512_loadu_si512(p)); }
  FUSEDRNN_HD static Simd load(const BFloat16* p, int n) {
    return Simd(_mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << n) - 1), p));
  }
};

FUSEDRNN_HD Simd<float> multiply_add(Simd<float> sum, Simd<BFloat16Pair> a, Simd<BFloat16Pair> b) {
  return Simd<float>(
      _mm512_dpbf16_ps(sum.v, reinterpret_cast<__m512bh>(a.v), reinterpret_cast<__m512bh>(b.v)));
}

// K floats that are values of bfloat16, one after another, as pairs. Returns where they are: out.
inline const BFloat16Pair* convert(const float* values, int64_t K, BFloat16Pair* out) {
  typedef uint16_t Halves __attribute__((vector_size(kVectorBytes)));
  constexpr int W = Simd<BFloat16Pair>::kWidth;
  Halves upper;
  for (int i = 0; i < 2 * W; ++i) upper[i] = static_cast<uint16_t>(2 * i + 1);
  for (int64_t k = 0; k < K; k += 2 * W) {
    const int left = static_cast<int>(std::min<int64_t>(K - k, 2 * W)), first = std::min(left, W);
    const auto a = Simd<float>::load(values + k, first),
               b = Simd<float>::load(values + k + first, left - first);
    const Halves pairs =
        __builtin_shuffle(reinterpret_cast<Halves>(a.v), reinterpret_cast<Halves>(b.v), upper);
    Simd<BFloat16Pair>(reinterpret_cast<__m512i>(pairs))
        .store(out + k / 2, static_cast<int>(operands_for<BFloat16Pair>(left)));
  }
  return out;
}

}  // namespace fusedrnn::FUSEDRNN_ISA
