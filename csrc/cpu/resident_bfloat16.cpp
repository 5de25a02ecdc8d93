// What AVX512-BF16 has of its own: the forward pass of bfloat16, whose products are those of pairs.
#include "bfloat16_pairs.h"
#include "forward.h"
#include "run.h"

namespace fusedrnn::FUSEDRNN_ISA {
namespace {

template <class Cell, class T>
using ForwardPassOfPairs = ForwardPass<Cell, T, BFloat16Pair>;

// Whether every factor is a value of bfloat16: where h is rounded to it, x and h0 came in it.
bool all_bfloat16(const ForwardParams<float>& p) {
  bool all = p.rounding == Rounding::kBFloat16;
  for (int64_t n = 0; n < p.N; ++n)
    all = all && p.recurrences[n].weight_ih.narrow && p.recurrences[n].weight_hh.narrow;
  return all;
}

}  // namespace

void forward(CellId cell, const ForwardParams<float>& p, const ResidentPlan& plan, const ThreadPool& pool) {
  if (all_bfloat16(p)) return run<ForwardPassOfPairs, float>(cell, p, plan, pool);
  avx512::kernels.f32.forward(cell, p, plan, pool);
}

}  // namespace fusedrnn::FUSEDRNN_ISA
