// The stepwise schedule's own part of a step: everything pointwise, in one kernel each way. The products
// between the steps are the caller's. Any size, any dtype, any cell.
#pragma once

#include "kernels.h"
#include "primitives/numbers.h"

namespace fusedrnn::cuda {

using namespace device;

inline constexpr int kStepThreads = 256;

template <class E>
struct AccumulatedIn {
  using Type = float;
};
template <>
struct AccumulatedIn<double> {
  using Type = double;
};

struct UploadParams {
  int64_t* to;
  int count;
  int64_t values[480];  // with the rest under the 4 KiB that any launch can carry
};

FUSEDRNN_KERNEL(kStepThreads)
upload_kernel(FUSEDRNN_PARAMS UploadParams p) {
  for (int i = thread_index(); i < p.count; i += threads_of_block()) p.to[i] = p.values[i];
}

// One launch's recurrences are `first` .. `first + N` of the `all` in the tensors.
template <class Call, class Step>
struct StepParams {
  Call call;
  Step step;
  Weights weights[kMaxRecurrences];
  int64_t first, all;
};

// Element `index` of [N, B, H], and its place in the tensors.
struct StepElement {
  int64_t n, b, unit;  // n within the launch
  int64_t state;       // in [all, B, H]

  FUSEDRNN_DEVICE StepElement(int64_t index, const Steps& steps, int64_t H, int64_t first)
      : n(index / (H * steps.B)),
        b(index / H % steps.B),
        unit(index % H),
        state(((first + n) * steps.B + b) * H + unit) {}
};

FUSEDRNN_DEVICE int64_t element_index() { return block_index() * threads_of_block() + thread_index(); }

template <class E, class A>
FUSEDRNN_DEVICE A bias_at(const void* bias, int64_t i) {
  return bias ? static_cast<A>(widen(static_cast<const E*>(bias)[i])) : A(0);
}

template <class Cell, class E>
FUSEDRNN_KERNEL(kStepThreads)
step_forward(FUSEDRNN_PARAMS StepParams<Forward, StepForward> p) {
  using A = typename AccumulatedIn<E>::Type;
  constexpr int G = Cell::kGates, S = Cell::kStates;
  const Forward& f = p.call;
  if (element_index() >= f.N * f.steps.B * f.H) return;
  const StepElement e(element_index(), f.steps, f.H, p.first);
  const Weights& w = p.weights[e.n];
  const int64_t t = w.reverse ? f.steps.T - 1 - p.step.s : p.step.s;
  if (e.b >= f.steps.count(t)) return;
  const int64_t row = (f.steps.offset(t) + e.b) * p.all + p.first + e.n, at = row * f.H + e.unit;

  Array<A, G> gx, gh;
#pragma unroll
  for (int gate = 0; gate < G; ++gate) {
    const int64_t i = gate * f.H + e.unit;
    gx[gate] = static_cast<const A*>(f.gx)[row * G * f.H + i] + bias_at<E, A>(w.bias_ih, i);
    gh[gate] = static_cast<const A*>(p.step.gh)[(e.state - e.unit) * G + i] + bias_at<E, A>(w.bias_hh, i);
  }
  Array<A, S> state;
  state[0] = Cell::kReadsH ? widen(static_cast<const E*>(p.step.state[0])[e.state]) : A(0);
#pragma unroll
  for (int j = 1; j < S; ++j) state[j] = static_cast<const A*>(p.step.state[j])[e.state];
  const auto next = Cell::forward(gx, gh, state);
  if (p.step.projected_from) {
    static_cast<A*>(p.step.projected_from)[at] = next.state[0];
  } else {
    const E h = narrow<E>(next.state[0]);
    static_cast<E*>(f.y)[at] = h;
    static_cast<E*>(p.step.state[0])[e.state] = h;
  }
#pragma unroll
  for (int j = 1; j < S; ++j) {
    static_cast<A*>(p.step.state[j])[e.state] = next.state[j];
    if (f.kept[j]) static_cast<A*>(f.kept[j])[at] = next.state[j];
  }
}

template <class Cell, class E>
FUSEDRNN_KERNEL(kStepThreads)
step_backward(FUSEDRNN_PARAMS StepParams<Backward, StepBackward> p) {
  using A = typename AccumulatedIn<E>::Type;
  constexpr int G = Cell::kGates, S = Cell::kStates;
  const Backward& f = p.call;
  if (element_index() >= f.N * f.steps.B * f.H) return;
  const StepElement e(element_index(), f.steps, f.H, p.first);
  const auto dstate = [&](int j) -> A& { return static_cast<A*>(p.step.dstate[j])[e.state]; };
  const A dh = static_cast<const A*>(p.step.dh)[e.state] + dstate(0);
  if (p.step.s == f.steps.T) {
    static_cast<E*>(f.dstate0[0])[e.state] = narrow<E>(dh);
#pragma unroll
    for (int j = 1; j < S; ++j) static_cast<E*>(f.dstate0[j])[e.state] = narrow<E>(dstate(j));
    return;
  }
  const Weights& w = p.weights[e.n];
  const int64_t t = w.reverse ? p.step.s : f.steps.T - 1 - p.step.s, before = w.reverse ? t + 1 : t - 1;
  if (e.b >= f.steps.count(t)) return;
  const int64_t row = (f.steps.offset(t) + e.b) * p.all + p.first + e.n, at = row * f.H + e.unit;
  const bool started = before >= 0 && before < f.steps.T && e.b < f.steps.count(before);

  Array<A, S> state, next, dnext;
  state[0] = Cell::kReadsH ? widen(static_cast<const E*>(f.h_previous)[at]) : A(0);
  next[0] = f.kept[0] ? static_cast<const A*>(f.kept[0])[at] : A(widen(static_cast<const E*>(f.y)[at]));
  dnext[0] = dh + (f.dy ? A(widen(static_cast<const E*>(f.dy)[at])) : A(0));
#pragma unroll
  for (int j = 1; j < S; ++j) {
    const auto* kept = static_cast<const A*>(f.kept[j]);
    next[j] = kept[at];
    state[j] = started ? kept[((f.steps.offset(before) + e.b) * p.all + p.first + e.n) * f.H + e.unit]
                       : A(widen(static_cast<const E*>(f.state0[j])[e.state]));
    dnext[j] = dstate(j);
  }
  Array<A, Cell::kSaved> saved;
  if constexpr (Cell::kSaved > 0) {
    Array<A, G> gx, gh;
#pragma unroll
    for (int gate = 0; gate < G; ++gate) {
      const int64_t i = gate * f.H + e.unit;
      gx[gate] = static_cast<const A*>(f.gx)[row * G * f.H + i] + bias_at<E, A>(w.bias_ih, i);
      gh[gate] = bias_at<E, A>(w.bias_hh, i);
      if (!Cell::kSameGates) gh[gate] += static_cast<const A*>(f.gh)[row * G * f.H + i];
    }
    saved = Cell::forward(gx, gh, state).saved;
  }
  const auto d = Cell::backward(dnext, saved, state, next);
#pragma unroll
  for (int gate = 0; gate < G; ++gate) {
    const int64_t i = row * G * f.H + gate * f.H + e.unit;
    static_cast<E*>(f.dgx)[i] = narrow<E>(d.dgx[gate]);
    if (!Cell::kSameGates) static_cast<E*>(f.dgh)[i] = narrow<E>(d.dgh[gate]);
  }
#pragma unroll
  for (int j = 0; j < S; ++j) dstate(j) = d.dstate[j];
}

struct PreviousRowsParams {
  Steps steps;
  int64_t N, P, rows;
  uint64_t reverse[(kMaxRecurrences + 63) / 64];  // bit n
  int64_t first, all;
  const void *h0, *y;
  void* h_previous;
};

// One thread a value of [rows, N, P]; E is any type of the size of a value.
template <class E>
FUSEDRNN_KERNEL(kStepThreads)
previous_rows_kernel(FUSEDRNN_PARAMS PreviousRowsParams p) {
  if (element_index() >= p.rows * p.N * p.P) return;
  const int64_t unit = element_index() % p.P, local = element_index() / p.P % p.N, n = p.first + local;
  const int64_t row = element_index() / (p.P * p.N);
  int64_t t = row / p.steps.B;
  if (p.steps.offsets) {
    int64_t low = 0, high = p.steps.T;  // the last step whose first row is not after this one
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (p.steps.offset(middle) <= row ? low : high) = middle;
    }
    t = low;
  }
  const int64_t b = row - p.steps.offset(t);
  const int64_t before = p.reverse[local / 64] >> local % 64 & 1 ? t + 1 : t - 1;
  const bool started = before >= 0 && before < p.steps.T && b < p.steps.count(before);
  static_cast<E*>(p.h_previous)[(row * p.all + n) * p.P + unit] =
      started ? static_cast<const E*>(p.y)[((p.steps.offset(before) + b) * p.all + n) * p.P + unit]
              : static_cast<const E*>(p.h0)[(n * p.steps.B + b) * p.P + unit];
}

}  // namespace fusedrnn::cuda
