// The resident schedule, compiled once per instruction set.
#include "backward.h"
#include "forward.h"
#include "run.h"

namespace fusedrnn::FUSEDRNN_ISA {
namespace {

template <class T>
constexpr KernelsOf<T> kernels_of() {
  return {run<ForwardPass, T, ForwardParams<T>>, run<BackwardPass, T, BackwardParams<T>>};
}

void apply(const char* function, float* values, int64_t n) {
  using V = Simd<float>;
  V (*f)(V) = nullptr;
  if (!std::strcmp(function, "sigmoid")) f = [](V x) { return sigmoid(x); };
  if (!std::strcmp(function, "tanh")) f = [](V x) { return tanh(x); };
  if (!std::strcmp(function, "bfloat16")) f = [](V x) { return round_to_bfloat16(x); };
  if (!std::strcmp(function, "half")) f = [](V x) { return round_to_half(x); };
  for (int64_t i = 0; f && i < n; i += V::kWidth) {
    const int lanes = static_cast<int>(n - i < V::kWidth ? n - i : V::kWidth);
    f(V::load(values + i, lanes)).store(values + i, lanes);
  }
}

}  // namespace

extern const Kernels kernels{Isa::FUSEDRNN_ISA, kVectorBytes, kernels_of<float>(), kernels_of<double>(),
                             apply};

}  // namespace fusedrnn::FUSEDRNN_ISA
