// How the resident schedule cuts a sequence into work for threads, and in which order its steps run.
//
// Work is cut by recurrence and by chunks of the batch, which never meet. Where a chunk would be too small,
// the hidden units are cut instead, and the workers exchange h (backward: dgates) once a step.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "product.h"
#include "sync.h"

namespace fusedrnn::FUSEDRNN_ISA {

template <class F>
void parallel_for(const ThreadPool& pool, int64_t n, const F& f) {
  pool.parallel_for(
      n,
      [](int64_t begin, int64_t end, void* context) {
        for (int64_t i = begin; i < end; ++i) (*static_cast<const F*>(context))(i);
      },
      const_cast<void*>(static_cast<const void*>(&f)));
}

template <class T>
FUSEDRNN_HD Simd<T> round_to(Rounding rounding, Simd<T> x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (rounding == Rounding::kBFloat16) return round_to_bfloat16(x);
    if (rounding == Rounding::kHalf) return round_to_half(x);
  }
  return x;
}

template <class T>
FUSEDRNN_HD Pair<T> round_to(Rounding rounding, Pair<T> x) {
  return {round_to<T>(rounding, x.a), round_to<T>(rounding, x.b)};
}

// One worker's share: rows [b0, b1) of recurrence n, and the slice it owns.
struct Job {
  int64_t n, b0, b1, own;
};

// What forward and backward have in common: the order of time, the rows of a step, the cut into jobs.
template <class T>
struct Layout {
  Steps steps;
  int64_t N;
  const Recurrence<T>* recurrences;
  const ResidentPlan& plan;

  int64_t time(int64_t n, int64_t i) const { return recurrences[n].reverse ? steps.T - 1 - i : i; }

  // The row a step starts from for sequences [0, before): those alive at the step before; the others start
  // now.
  struct Before {
    int64_t offset, alive;
  };
  Before before(int64_t n, int64_t t) const {
    const int64_t s = recurrences[n].reverse ? t + 1 : t - 1;
    if (s < 0 || s >= steps.T) return {0, 0};
    return {steps.offset(s), steps.count(s)};
  }

  int64_t groups() const { return N * plan.row_chunks; }
  Job job(int64_t i) const {
    const int64_t group = i / plan.unit_slices, chunk = group % plan.row_chunks;
    return {group / plan.row_chunks, plan.row_bounds[chunk], plan.row_bounds[chunk + 1],
            i % plan.unit_slices};
  }

  // Runs step(job, i, slice) for i in [0, count) of every group, in order within a group.
  template <class Step>
  void run(const ThreadPool& pool, int64_t count, const Step& step) const {
    Buffer<SliceSync> syncs(plan.unit_slices > 1 ? groups() : 0);
    if (plan.unit_slices > 1)
      for (int64_t g = 0; g < groups(); ++g) new (syncs.get() + g) SliceSync();
    parallel_for(pool, groups() * plan.unit_slices, [&](int64_t i) {
      const Job j = job(i);
      if (plan.unit_slices == 1)
        for (int64_t s = 0; s < count; ++s) step(j, s, 0);
      else
        syncs.get()[i / plan.unit_slices].run(count, plan.unit_slices, j.own,
                                              [&](int64_t s, int64_t slice) { step(j, s, slice); });
    });
  }

  // The items of [0, count) that belong to a slice.
  struct Range {
    int64_t begin, end;
  };
  Range slice_of(int64_t count, int64_t slice) const {
    return {count * slice / plan.unit_slices, count * (slice + 1) / plan.unit_slices};
  }
};

}  // namespace fusedrnn::FUSEDRNN_ISA
