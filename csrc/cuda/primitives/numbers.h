// The dtypes of tensors in device memory, and their conversions: to nearest even, overflow to infinity.
#pragma once

#include "../../sequence.h"
#include "thread.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include <bit>
#endif

namespace fusedrnn::device {

struct Half {
  uint16_t bits;
};

FUSEDRNN_DEVICE float widen(float x) { return x; }
FUSEDRNN_DEVICE double widen(double x) { return x; }

template <class E>
struct Narrow {  // float, double
  template <class A>
  FUSEDRNN_DEVICE static E from(A x) {
    return static_cast<E>(x);
  }
};

#if defined(__CUDACC__)

FUSEDRNN_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
FUSEDRNN_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }

FUSEDRNN_DEVICE float widen(BFloat16 x) { return float_of(uint32_t{x.bits} << 16); }
FUSEDRNN_DEVICE float widen(Half x) { return __half2float(__ushort_as_half(x.bits)); }

template <>
struct Narrow<BFloat16> {
  FUSEDRNN_DEVICE static BFloat16 from(float x) { return {__bfloat16_as_ushort(__float2bfloat16_rn(x))}; }
};
template <>
struct Narrow<Half> {
  FUSEDRNN_DEVICE static Half from(float x) { return {__half_as_ushort(__float2half_rn(x))}; }
};

// To the 10 explicit mantissa bits of a tf32 operand, ties away from zero.
FUSEDRNN_DEVICE float round_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return float_of(bits);
}

#else

inline uint32_t bits_of(float x) { return std::bit_cast<uint32_t>(x); }
inline float float_of(uint32_t bits) { return std::bit_cast<float>(bits); }

inline float widen(BFloat16 x) { return float_of(uint32_t{x.bits} << 16); }
inline float widen(Half x) { return static_cast<float>(std::bit_cast<_Float16>(x.bits)); }

template <>
struct Narrow<BFloat16> {
  static BFloat16 from(float x) {
    const uint32_t bits = bits_of(x);
    if (x != x) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
    return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
  }
};
template <>
struct Narrow<Half> {
  static Half from(float x) { return {std::bit_cast<uint16_t>(static_cast<_Float16>(x))}; }
};

inline float round_tf32(float x) {
  const uint32_t bits = bits_of(x);
  const bool finite = (bits & 0x7f800000) != 0x7f800000;
  return float_of(finite ? (bits + 0x1000) & ~0x1fffu : bits);
}

#endif

template <class E, class A>
FUSEDRNN_DEVICE E narrow(A x) {
  return Narrow<E>::from(x);
}

}  // namespace fusedrnn::device
