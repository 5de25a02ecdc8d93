// SIMD vectors of units on compiler vector extensions, and the functions cells call on them.
//
// Compiled once per instruction set, each time in a namespace of its own (FUSEDRNN_ISA), so that no code for
// a wide machine is shared with, and picked by the linker for, a narrow one.
#pragma once

#include <cstdint>
#include <cstring>

#include "../cells/cell.h"

namespace fusedrnn::FUSEDRNN_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
inline constexpr int kRegisters = 32;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
inline constexpr int kRegisters = 16;
#else
inline constexpr int kVectorBytes = 16;
inline constexpr int kRegisters = 16;
#endif

// The compiler's vectors; `Unaligned` is for memory.
template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float Raw __attribute__((vector_size(kVectorBytes)));
  typedef float Unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
};
template <>
struct VectorOf<double> {
  typedef double Raw __attribute__((vector_size(kVectorBytes)));
  typedef double Unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
};
typedef int32_t Int32s __attribute__((vector_size(kVectorBytes)));

template <class T>
struct Simd {
  static constexpr int kWidth = kVectorBytes / sizeof(T);
  using Raw = typename VectorOf<T>::Raw;
  using Unaligned = typename VectorOf<T>::Unaligned;
  Raw v;

  Simd() = default;
  FUSEDRNN_HD Simd(Raw raw) : v(raw) {}
  FUSEDRNN_HD explicit Simd(T s) : v(s - Raw{}) {}  // s - 0 keeps the sign of zero
  FUSEDRNN_HD static Simd load(const T* p) { return Simd(Raw(*reinterpret_cast<const Unaligned*>(p))); }
  FUSEDRNN_HD void store(T* p) const { *reinterpret_cast<Unaligned*>(p) = v; }

  // The first n lanes; the others are zero.
  FUSEDRNN_HD static Simd load(const T* p, int n) {
    if (n == kWidth) return load(p);
    Simd out(T(0));
    std::memcpy(&out.v, p, n * sizeof(T));
    return out;
  }
  FUSEDRNN_HD void store(T* p, int n) const {
    if (n == kWidth) return store(p);
    std::memcpy(p, &v, n * sizeof(T));
  }

  FUSEDRNN_HD friend Simd operator+(Simd a, Simd b) { return Simd(a.v + b.v); }
  FUSEDRNN_HD friend Simd operator-(Simd a, Simd b) { return Simd(a.v - b.v); }
  FUSEDRNN_HD friend Simd operator*(Simd a, Simd b) { return Simd(a.v * b.v); }
  FUSEDRNN_HD friend Simd operator/(Simd a, Simd b) { return Simd(a.v / b.v); }
};

template <class T>
FUSEDRNN_HD Simd<T> where_less(Simd<T> a, Simd<T> b, Simd<T> x, Simd<T> y) {
  return Simd<T>(a.v < b.v ? x.v : y.v);
}

// exp(x) - 1 = scale * expm1(r) + (scale - 1) with x = n ln 2 + r, scale = 2^n. The polynomial is the Taylor
// series to degree 7: on |r| <= ln(2)/2 its first omitted term is 2e-8 of the result, a third of an ulp.
struct ExpParts {
  Simd<float> scale, expm1_r;
};

FUSEDRNN_HD ExpParts exp_parts(Simd<float> x) {
  using V = Simd<float>;
  const V magic(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  const V shifted = x * V(1.44269504f) + magic;
  const V n = shifted - magic;
  const V r =
      (x - n * V(0.693359375f)) - n * V(-2.12194440e-4f);  // ln 2 in two parts, the first exact in n * ln 2
  V p(1.0f / 5040);
  p = p * r + V(1.0f / 720);
  p = p * r + V(1.0f / 120);
  p = p * r + V(1.0f / 24);
  p = p * r + V(1.0f / 6);
  p = p * r + V(0.5f);
  p = p * r * r + r;
  const Int32s exponent = (reinterpret_cast<Int32s>(shifted.v) << 23) + (127 << 23);
  return {V(reinterpret_cast<V::Raw>(exponent)), p};
}

// Limits that keep a NaN.
FUSEDRNN_HD Simd<float> clamp(Simd<float> x, float low, float high) {
  x = where_less(x, Simd<float>(low), Simd<float>(low), x);
  return where_less(Simd<float>(high), x, Simd<float>(high), x);
}

FUSEDRNN_HD Simd<float> sigmoid(Simd<float> x) {
  const Simd<float> one(1.0f);
  const ExpParts e = exp_parts(clamp(Simd<float>(0.0f) - x, -87.0f, 88.0f));
  return one / (one + (e.scale * e.expm1_r + e.scale));
}

// tanh(x) = expm1(2x) / (expm1(2x) + 2); beyond |x| = 10 it is 1 to the last bit.
FUSEDRNN_HD Simd<float> tanh(Simd<float> x) {
  const ExpParts e = exp_parts(clamp(x + x, -20.0f, 20.0f));
  const Simd<float> expm1 = e.scale * e.expm1_r + (e.scale - Simd<float>(1.0f));
  return expm1 / (expm1 + Simd<float>(2.0f));
}

// fp64 is for gradient checks: the C library's functions, lane by lane.
FUSEDRNN_HD Simd<double> sigmoid(Simd<double> x) {
  for (int i = 0; i < Simd<double>::kWidth; ++i) x.v[i] = 1 / (1 + std::exp(-x.v[i]));
  return x;
}

FUSEDRNN_HD Simd<double> tanh(Simd<double> x) {
  for (int i = 0; i < Simd<double>::kWidth; ++i) x.v[i] = std::tanh(x.v[i]);
  return x;
}

// Rounds to the nearest value of a 16-bit format, ties to even, without leaving fp32.
FUSEDRNN_HD Simd<float> round_to_bfloat16(Simd<float> x) {
  const Int32s bits = reinterpret_cast<Int32s>(x.v);
  const Int32s rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & ~0xffff;
  return Simd<float>(x.v == x.v ? reinterpret_cast<Simd<float>::Raw>(rounded) : x.v);
}

FUSEDRNN_HD Simd<float> round_to_half(Simd<float> x) {
  using V = Simd<float>;
  const Int32s bits = reinterpret_cast<Int32s>(x.v), magnitude = bits & 0x7fffffff;
  const Int32s sign = bits & static_cast<int32_t>(0x80000000u);
  const V absolute(reinterpret_cast<V::Raw>(magnitude));
  const Int32s normal = (magnitude + 0xfff + ((magnitude >> 13) & 1)) & ~0x1fff;
  // Below 2^-14 the spacing is 2^-24: that of fp32 at 0.5.
  const V subnormal = (absolute + V(0.5f)) - V(0.5f);
  V rounded(absolute.v < 6.103515625e-5f ? subnormal.v : reinterpret_cast<V::Raw>(normal));
  rounded = V(rounded.v > 65504.0f ? V(__builtin_inff()).v : rounded.v);
  rounded = V(reinterpret_cast<V::Raw>(reinterpret_cast<Int32s>(rounded.v) | sign));
  return V(x.v == x.v ? rounded.v : x.v);
}

}  // namespace fusedrnn::FUSEDRNN_ISA
