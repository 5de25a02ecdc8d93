// The functions of kernels.h: which kernel, how many blocks, which parameters.
#include <algorithm>
#include <map>
#include <mutex>

#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../cells/rnn.h"
#include "launch.h"
#include "persistent_kernels.h"
#include "stepwise.cuh"

namespace fusedrnn::cuda {
namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls f(Cell{}).
template <class F>
auto with_cell(CellId cell, F f) {
  switch (cell) {
    case CellId::kLstm:
      return f(Lstm{});
    case CellId::kGru:
      return f(Gru{});
    case CellId::kRnnTanh:
      return f(RnnTanh{});
    case CellId::kRnnRelu:
      return f(RnnRelu{});
    case CellId::kLstmPeephole:
      break;
  }
  throw std::invalid_argument("no such cell");
}

// Calls f(Operand{}) with what the recurrent product of tensors of that dtype multiplies.
template <class F>
auto with_operand(Number number, bool tf32, F f) {
  switch (number) {
    case Number::kBFloat16:
      return f(BFloat16Operand{});
    case Number::kHalf:
      return f(HalfOperand{});
    case Number::kFloat:
      return tf32 ? f(Tf32Operand{}) : f(FloatOperand{});
    case Number::kDouble:
      break;
  }
  throw std::invalid_argument("no persistent kernel of that dtype");
}

template <class F>
auto with_number(Number number, F f) {
  switch (number) {
    case Number::kBFloat16:
      return f(BFloat16{});
    case Number::kHalf:
      return f(Half{});
    case Number::kFloat:
      return f(float{});
    case Number::kDouble:
      return f(double{});
  }
  throw std::invalid_argument("no such dtype");
}

// Calls f(first, count) for every part of N recurrences that one launch can take.
template <class F>
void in_parts(int64_t N, F f) {
  for (int64_t first = 0; first < N; first += kMaxRecurrences)
    f(first, std::min<int64_t>(kMaxRecurrences, N - first));
}

int64_t flag_bytes(const PersistentPlan& plan) { return divide_up(plan.slices, 32) * 128; }

// A group's: two buffers of its operand, then the flags of its slices.
int64_t group_bytes(const PersistentPlan& plan, const PersistentPass& pass) {
  return plan.exchange == Exchange::kGrid ? 2 * shared_layout(plan, pass).operand_bytes + flag_bytes(plan)
                                          : 0;
}

LaunchShape shape_of(const PersistentPlan& plan, const PersistentPass& pass, int64_t groups) {
  return {groups * plan.slices, plan.threads(), shared_layout(plan, pass).bytes,
          plan.exchange == Exchange::kCluster ? plan.slices : 1, plan.exchange == Exchange::kGrid};
}

template <class Params, class Call>
Params common_params(const Call& call, const PersistentPlan& plan, const PersistentPass& pass,
                     uint32_t* status) {
  Params p{};
  p.plan = plan;
  const auto narrowed = [](int64_t size) {
    if (size > INT32_MAX) throw std::invalid_argument("a dimension does not fit 31 bits");
    return static_cast<int>(size);
  };
  p.steps = call.steps;
  p.T = narrowed(call.steps.T);
  p.B = narrowed(call.steps.B);
  p.H = narrowed(call.H);
  p.all = narrowed(call.N);
  p.group_bytes = group_bytes(plan, pass);
  p.status = status;
  return p;
}

// Launches all groups, as many at once as the plan has shown to be resident.
template <class Params>
void launch_groups(void (*kernel)(Params), Params p, const Weights* weights, const PersistentPass& pass,
                   void* workspace, void* stream) {
  const int64_t tiles = divide_up(p.steps.B, p.plan.rows());
  in_parts(p.all, [&](int64_t first, int64_t count) {
    std::copy_n(weights + first, count, p.weights);
    p.first = static_cast<int>(first);
    p.N = static_cast<int>(count);
    p.workspace = static_cast<char*>(workspace) + first * tiles * p.group_bytes;
    for (p.first_group = 0; p.first_group < count * tiles; p.first_group += p.plan.groups)
      launch(kernel, p,
             shape_of(p.plan, pass, std::min<int64_t>(p.plan.groups, count * tiles - p.first_group)), stream);
  });
}

template <class E, size_t N>
void cast_all(E* (&to)[N], void* const (&from)[N]) {
  for (size_t i = 0; i < N; ++i) to[i] = static_cast<E*>(from[i]);
}
template <class E, size_t N>
void cast_all(const E* (&to)[N], const void* const (&from)[N]) {
  for (size_t i = 0; i < N; ++i) to[i] = static_cast<const E*>(from[i]);
}

LaunchShape one_thread_each(int64_t elements) {
  return {divide_up(elements, kStepThreads), kStepThreads, 0, 1, false};
}

template <class Call, class Step, class Launch>
void launch_step(const Call& call, const Step& step, Launch launch_kernel) {
  StepParams<Call, Step> p{call, step, {}, 0, call.N};
  in_parts(call.N, [&](int64_t first, int64_t count) {
    std::copy_n(call.weights + first, count, p.weights);
    p.first = first;
    p.call.N = count;
    launch_kernel(p, one_thread_each(count * call.steps.B * call.H));
  });
}

}  // namespace

PersistentPass pass_of(CellId cell, Number number, bool tf32, bool backward) {
  return with_cell(cell, [&]<class Cell>(Cell) {
    return with_operand(number, tf32, [&]<class Op>(Op) {
      return backward ? BackwardPass<Cell, Op>::kPass : ForwardPass<Cell, Op>::kPass;
    });
  });
}

bool resident(const PersistentPlan& plan, bool backward, CellId cell, Number number, bool tf32) {
  const LaunchShape shape = shape_of(plan, pass_of(cell, number, tf32, backward), plan.groups);
  return with_cell(cell, [&]<class Cell>(Cell) {
    return with_operand(number, tf32, [&]<class Op>(Op) {
      using Kernels = PersistentKernels<Cell, Op>;
      return backward ? fits(Kernels::backward(plan.exchange), shape)
                      : fits(Kernels::forward(plan.exchange), shape);
    });
  });
}

void upload(const int64_t* from, int64_t count, int64_t* to, void* stream) {
  UploadParams p{};
  for (int64_t done = 0; done < count; done += p.count) {
    p.to = to + done;
    p.count = static_cast<int>(std::min<int64_t>(count - done, std::size(p.values)));
    std::copy_n(from + done, p.count, p.values);
    launch(upload_kernel, p, {1, kStepThreads, 0, 1, false}, stream);
  }
}

#if defined(__CUDACC__)

void set_device(int device) { check_cuda(cudaSetDevice(device), "cudaSetDevice"); }

GpuDevice device_limits() {
  return limits_of_current_device(PersistentKernels<RnnTanh, BFloat16Operand>::forward(Exchange::kCluster));
}

uint32_t* status_word(int device) {
  static std::mutex mutex;
  static std::map<int, uint32_t*> words;
  const std::lock_guard lock(mutex);
  uint32_t*& word = words[device];
  if (!word) {
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;  // a capture may be the first to come here
    cudaThreadExchangeStreamCaptureMode(&mode);
    const cudaError_t error =
        cudaHostAlloc(reinterpret_cast<void**>(&word), sizeof *word, cudaHostAllocMapped);
    cudaThreadExchangeStreamCaptureMode(&mode);
    check_cuda(error, "cudaHostAlloc");
    *word = 0;
  }
  return word;
}

#else

void set_device(int) {}

// A small device, so that a user's model does not become a hundred thousand fibers.
GpuDevice device_limits() { return {8, 227 << 10, {4, 2}, true}; }

uint32_t* status_word(int) {
  thread_local uint32_t word = 0;
  return &word;
}

#endif

int64_t workspace_bytes(const PersistentPlan& plan, const PersistentPass& pass, int64_t N, int64_t B) {
  return N * divide_up(B, plan.rows()) * group_bytes(plan, pass);
}

void run(const Forward& f, const PersistentPlan& plan, void* workspace, uint32_t* status, void* stream) {
  with_cell(f.cell, [&]<class Cell>(Cell) {
    with_operand(f.number, f.tf32, [&]<class Op>(Op) {
      using Pass = ForwardPass<Cell, Op>;
      using E = typename Pass::E;
      auto p = common_params<typename Pass::Params>(f, plan, Pass::kPass, status);
      p.gx = static_cast<const float*>(f.gx);
      p.y = static_cast<E*>(f.y);
      cast_all(p.state0, f.state0);
      cast_all(p.final_state, f.final_state);
      cast_all(p.kept, f.kept);
      launch_groups(PersistentKernels<Cell, Op>::forward(plan.exchange), p, f.weights, Pass::kPass, workspace,
                    stream);
    });
  });
}

void run(const Backward& f, const PersistentPlan& plan, void* workspace, uint32_t* status, void* stream) {
  with_cell(f.cell, [&]<class Cell>(Cell) {
    with_operand(f.number, f.tf32, [&]<class Op>(Op) {
      using Pass = BackwardPass<Cell, Op>;
      using E = typename Pass::E;
      auto p = common_params<typename Pass::Params>(f, plan, Pass::kPass, status);
      p.gx = static_cast<const float*>(f.gx);
      p.gh = static_cast<const float*>(f.gh);
      p.h_previous = static_cast<const E*>(f.h_previous);
      p.y = static_cast<const E*>(f.y);
      p.dy = static_cast<const E*>(f.dy);
      p.dgx = static_cast<E*>(f.dgx);
      p.dgh = static_cast<E*>(f.dgh);
      cast_all(p.kept, f.kept);
      cast_all(p.state0, f.state0);
      cast_all(p.dfinal, f.dfinal);
      cast_all(p.dstate0, f.dstate0);
      launch_groups(PersistentKernels<Cell, Op>::backward(plan.exchange), p, f.weights, Pass::kPass,
                    workspace, stream);
    });
  });
}

void run(const Forward& f, const StepForward& step, void* stream) {
  with_cell(f.cell, [&]<class Cell>(Cell) {
    with_number(f.number, [&]<class E>(E) {
      launch_step(f, step, [&](const auto& p, const LaunchShape& shape) {
        launch(step_forward<Cell, E>, p, shape, stream);
      });
    });
  });
}

void run(const Backward& f, const StepBackward& step, void* stream) {
  with_cell(f.cell, [&]<class Cell>(Cell) {
    with_number(f.number, [&]<class E>(E) {
      launch_step(f, step, [&](const auto& p, const LaunchShape& shape) {
        launch(step_backward<Cell, E>, p, shape, stream);
      });
    });
  });
}

void previous_rows(Number number, const Steps& steps, int64_t rows, int64_t N, int64_t P,
                   const Weights* weights, const void* h0, const void* y, void* h_previous, void* stream) {
  PreviousRowsParams p{steps, 0, P, rows, {}, 0, N, h0, y, h_previous};
  in_parts(N, [&](int64_t first, int64_t count) {
    p.first = first;
    p.N = count;
    std::fill(std::begin(p.reverse), std::end(p.reverse), 0);
    for (int64_t n = 0; n < count; ++n) p.reverse[n / 64] |= uint64_t{weights[first + n].reverse} << n % 64;
    with_number(number, [&]<class E>(E) {
      launch(previous_rows_kernel<E>, p, one_thread_each(rows * count * P), stream);
    });
  });
}

}  // namespace fusedrnn::cuda
