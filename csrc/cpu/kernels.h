// The CPU kernels as functions that know nothing of torch, one set per instruction set.
#pragma once

#include "../plan.h"
#include "../sequence.h"

namespace fusedrnn {

// Runs body(context, begin, end) over chunks of [0, n), in parallel if it likes.
struct ThreadPool {
  using Body = void (*)(int64_t begin, int64_t end, void* context);
  void (*parallel_for)(int64_t n, Body body, void* context);
};

template <class T>
struct KernelsOf {
  void (*forward)(CellId, const ForwardParams<T>&, const ResidentPlan&, const ThreadPool&);
  void (*backward)(CellId, const BackwardParams<T>&, const ResidentPlan&, const ThreadPool&);
};

// The instruction sets, from the narrowest on. fusedrnn/env.py has the same.
enum class Isa { portable, avx2, avx512, avx512bf16 };
inline constexpr const char* kIsaNames[] = {"portable", "avx2", "avx512", "avx512bf16"};

struct Kernels {
  Isa isa;
  int vector_bytes;
  KernelsOf<float> f32;
  KernelsOf<double> f64;
  // Applies a function of cpu/simd.h to n floats, in place, for its accuracy tests.
  void (*apply)(const char* function, float* values, int64_t n);

  const char* name() const { return kIsaNames[static_cast<int>(isa)]; }
  template <class T>
  const KernelsOf<T>& of() const {
    if constexpr (sizeof(T) == sizeof(float))
      return f32;
    else
      return f64;
  }
};

namespace portable {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512bf16 {  // as avx512, but for this
void forward(CellId, const ForwardParams<float>&, const ResidentPlan&, const ThreadPool&);
}

// The widest set this processor runs, or the one FUSEDRNN_CPU_ISA names; throws std::runtime_error if the
// processor lacks it.
const Kernels& kernels();

}  // namespace fusedrnn
