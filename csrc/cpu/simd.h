// SIMD vectors of units on compiler vector extensions, and the functions cells call on them.
//
// Compiled once per instruction set, each time in a namespace of its own (FUSEDRNN_ISA), so that no code for
// a wide machine is shared with, and picked by the linker for, a narrow one.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "../cells/cell.h"
#include "../sequence.h"

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
  typedef int32_t Lanes __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double Raw __attribute__((vector_size(kVectorBytes)));
  typedef double Unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef int64_t Lanes __attribute__((vector_size(kVectorBytes)));
};
typedef int32_t Int32s __attribute__((vector_size(kVectorBytes)));
typedef uint16_t HalfLanes __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));

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

  FUSEDRNN_HD static Simd load(const BFloat16* p) {
    static_assert(sizeof(T) == sizeof(float));
    const Int32s lanes = __builtin_convertvector(*reinterpret_cast<const HalfLanes*>(p), Int32s);
    return Simd(reinterpret_cast<Raw>(lanes << 16));
  }
  FUSEDRNN_HD static Simd load(const BFloat16* p, int n) {
    if (n == kWidth) return load(p);
    BFloat16 lanes[kWidth] = {};
    std::memcpy(lanes, p, n * sizeof(BFloat16));
    return load(lanes);
  }

  // As a Pair does, of one row.
  FUSEDRNN_HD static Simd load_rows(const T* p, int64_t, int n) { return load(p, n); }
  FUSEDRNN_HD void store_rows(T* p, int64_t, int n) const { store(p, n); }

  FUSEDRNN_HD friend Simd operator+(Simd a, Simd b) { return Simd(a.v + b.v); }
  FUSEDRNN_HD friend Simd operator-(Simd a, Simd b) { return Simd(a.v - b.v); }
  FUSEDRNN_HD friend Simd operator*(Simd a, Simd b) { return Simd(a.v * b.v); }
  FUSEDRNN_HD friend Simd operator/(Simd a, Simd b) { return Simd(a.v / b.v); }
};

template <class T>
FUSEDRNN_HD Simd<T> multiply_add(Simd<T> sum, Simd<T> a, Simd<T> b) {
  return sum + a * b;
}

template <class T>
FUSEDRNN_HD Simd<T> where_less(Simd<T> a, Simd<T> b, Simd<T> x, Simd<T> y) {
  return Simd<T>(a.v < b.v ? x.v : y.v);
}

// Limits that keep a NaN.
FUSEDRNN_HD Simd<float> clamp(Simd<float> x, float low, float high) {
#if defined(__AVX512F__)  // of two operands, these take the second if either is a NaN
  return Simd<float>(
      _mm512_maskz_min_ps(-1, _mm512_set1_ps(high), _mm512_maskz_max_ps(-1, _mm512_set1_ps(low), x.v)));
#elif defined(__AVX2__)
  return Simd<float>(_mm256_min_ps(_mm256_set1_ps(high), _mm256_max_ps(_mm256_set1_ps(low), x.v)));
#else
  return Simd<float>(_mm_min_ps(_mm_set1_ps(high), _mm_max_ps(_mm_set1_ps(low), x.v)));
#endif
}

// a / b for 1 <= b < 2^126, to an ulp. A division of the widest vectors takes as long as ten products.
FUSEDRNN_HD Simd<float> quotient(Simd<float> a, Simd<float> b) {
#if defined(__AVX512F__)
  const Simd<float> near(_mm512_maskz_rcp14_ps(-1, b.v));
  const Simd<float> reciprocal = near + near * (Simd<float>(1.0f) - b * near), q = a * reciprocal;
  return q + reciprocal * (a - b * q);
#else
  return a / b;
#endif
}

// exp(Factor x) - 1 = scale * expm1 + (scale - 1) with Factor x = n ln 2 + Factor r, scale = 2^n, and
// expm1 = exp(Factor r) - 1, for a Factor that is a power of two: it scales the constants and costs nothing.
// The polynomial is the Taylor series to degree 7: on |Factor r| <= ln(2)/2 its first omitted term is 2e-8 of
// the result, a third of an ulp. It is added up as a tree, which is done sooner than a chain.
struct ExpParts {
  Simd<float> scale, expm1;
};

template <int Factor>
FUSEDRNN_HD ExpParts exp_parts(Simd<float> x) {
  using V = Simd<float>;
  constexpr float F = Factor, F2 = F * F, F3 = F2 * F;
  const V magic(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  const V shifted = x * V(1.44269504f * F) + magic;
  const V n = shifted - magic;
  // ln 2 in two parts, the first exact in n * ln 2
  const V r = (x - n * V(0.693359375f / F)) - n * V(-2.12194440e-4f / F);
  const V r2 = r * r;
  const V p23 = r * V(F3 / 6) + V(F2 / 2), p45 = r * V(F2 * F3 / 120) + V(F2 * F2 / 24),
          p67 = r * V(F3 * F3 * F / 5040) + V(F3 * F3 / 720);
  const V expm1 = (r2 * (r2 * p67 + p45) + p23) * r2 + r * V(F);
  const Int32s exponent = (reinterpret_cast<Int32s>(shifted.v) << 23) + (127 << 23);
  return {V(reinterpret_cast<V::Raw>(exponent)), expm1};
}

FUSEDRNN_HD Simd<float> sigmoid(Simd<float> x) {
  const Simd<float> one(1.0f);
  const ExpParts e = exp_parts<-1>(clamp(x, -87.0f, 87.0f));
  return quotient(one, one + (e.scale * e.expm1 + e.scale));
}

// tanh(x) = expm1(2x) / (expm1(2x) + 2); beyond |x| = 10 it is 1 to the last bit.
FUSEDRNN_HD Simd<float> tanh(Simd<float> x) {
  const ExpParts e = exp_parts<2>(clamp(x, -10.0f, 10.0f));
  const Simd<float> expm1 = e.scale * e.expm1 + (e.scale - Simd<float>(1.0f));
  return quotient(expm1, expm1 + Simd<float>(2.0f));
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

// Vectors of two rows: a cell is a chain of operations, and one chain leaves most of the processor idle.
template <class T>
struct Pair {
  Simd<T> a, b;

  Pair() = default;
  FUSEDRNN_HD Pair(Simd<T> a, Simd<T> b) : a(a), b(b) {}
  FUSEDRNN_HD explicit Pair(T s) : a(s), b(s) {}

  FUSEDRNN_HD static Pair load_rows(const T* p, int64_t ld, int n) {
    return {Simd<T>::load(p, n), Simd<T>::load(p + ld, n)};
  }
  FUSEDRNN_HD void store_rows(T* p, int64_t ld, int n) const {
    a.store(p, n);
    b.store(p + ld, n);
  }

  FUSEDRNN_HD friend Pair operator+(Pair x, Pair y) { return {x.a + y.a, x.b + y.b}; }
  FUSEDRNN_HD friend Pair operator-(Pair x, Pair y) { return {x.a - y.a, x.b - y.b}; }
  FUSEDRNN_HD friend Pair operator*(Pair x, Pair y) { return {x.a * y.a, x.b * y.b}; }
};

template <class T>
FUSEDRNN_HD Pair<T> where_less(Pair<T> x, Pair<T> y, Pair<T> u, Pair<T> v) {
  return {where_less(x.a, y.a, u.a, v.a), where_less(x.b, y.b, u.b, v.b)};
}
template <class T>
FUSEDRNN_HD Pair<T> sigmoid(Pair<T> x) {
  return {sigmoid(x.a), sigmoid(x.b)};
}
template <class T>
FUSEDRNN_HD Pair<T> tanh(Pair<T> x) {
  return {tanh(x.a), tanh(x.b)};
}

}  // namespace fusedrnn::FUSEDRNN_ISA
