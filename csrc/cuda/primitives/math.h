// Arithmetic for cells whose operands have 16 or fewer significant bits: the device's fast exponential and
// division, each with a relative error of about 1e-6. No function with an absolute error (tanh.approx) is
// used.
#pragma once

#include "thread.h"

namespace fusedrnn::device {

struct Fast {
  float value;
  Fast() = default;
  FUSEDRNN_DEVICE explicit Fast(float x) : value(x) {}
};

FUSEDRNN_DEVICE Fast operator+(Fast a, Fast b) { return Fast(a.value + b.value); }
FUSEDRNN_DEVICE Fast operator-(Fast a, Fast b) { return Fast(a.value - b.value); }
FUSEDRNN_DEVICE Fast operator*(Fast a, Fast b) { return Fast(a.value * b.value); }

#if defined(__CUDACC__)
FUSEDRNN_DEVICE float fast_exp(float x) { return __expf(x); }
FUSEDRNN_DEVICE float fast_divide(float a, float b) { return __fdividef(a, b); }
#else
inline float fast_exp(float x) { return std::exp(x); }
inline float fast_divide(float a, float b) { return a / b; }
#endif

FUSEDRNN_DEVICE Fast sigmoid(Fast x) { return Fast(fast_divide(1.0f, 1.0f + fast_exp(-x.value))); }

FUSEDRNN_DEVICE Fast tanh(Fast x) {
  // 1 - 2 / (e^2x + 1) loses the digits of a small x, where x - x^3/3 is exact to the same error.
  const float y = 1.0f - fast_divide(2.0f, fast_exp(2.0f * x.value) + 1.0f);
  const float square = x.value * x.value;
  const float small = x.value * (1.0f - square * (0.333333333f - square * 0.133333333f));
  return Fast(square < 0.01f ? small : y);
}

FUSEDRNN_DEVICE Fast where_less(Fast a, Fast b, Fast x, Fast y) { return a.value < b.value ? x : y; }

}  // namespace fusedrnn::device
