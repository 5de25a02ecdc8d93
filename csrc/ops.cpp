// The torch ops: schemas, checks, allocation and the whole-sequence products. Nothing else touches torch.
//
// Cells are numbers here, not names: the stable ABI's conversion of strings leaks each one (torch 2.13).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "cells/gru.h"
#include "cells/lstm.h"
#include "cells/rnn.h"
#include "cpu/kernels.h"

namespace fusedrnn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// What the ops need to know of a cell, from its C++ struct.
struct CellTraits {
  const char* name;
  int gates, states, saved;
  bool same_gates, reads_h;
};

template <class Cell>
constexpr CellTraits traits_of(const char* name) {
  return {name, Cell::kGates, Cell::kStates, Cell::kSaved, Cell::kSameGates, Cell::kReadsH};
}

constexpr CellTraits kCells[] = {traits_of<Lstm>("lstm"), traits_of<Gru>("gru"),
                                 traits_of<RnnTanh>("rnn_tanh"), traits_of<RnnRelu>("rnn_relu")};

// Autograd is registered on the ops themselves; what they call must not record a second graph.
class NoGrad {
 public:
  NoGrad() : enabled_(aoti_torch_grad_mode_is_enabled()) { aoti_torch_grad_mode_set_enabled(false); }
  ~NoGrad() { aoti_torch_grad_mode_set_enabled(enabled_); }
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  bool enabled_;
};

// Calls into torch that the stable headers have no function for.

Tensor mm_out(const Tensor& out, const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor stack_rows(const Tensors& tensors) {
  if (tensors.size() == 1) return tensors[0];
  std::array<StableIValue, 2> stack{torch::stable::detail::from(tensors),
                                    torch::stable::detail::from(int64_t{0})};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::cat", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor to_dtype(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

// A copy that shares nothing with t.
Tensor copy_as(const Tensor& t, ScalarType dtype) {
  Tensor out = torch::stable::empty(t.sizes(), dtype);
  return torch::stable::copy_(out, t);
}

Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::empty(std::vector<int64_t>(sizes), dtype);
}

Tensor zeros_like(const Tensor& t, ScalarType dtype) {
  Tensor out = torch::stable::empty(t.sizes(), dtype);
  return torch::stable::zero_(out);
}

std::string shape_of(const Tensor& t) {
  std::string out = "[";
  for (int64_t d = 0; d < t.dim(); ++d) out += (d ? ", " : "") + std::to_string(t.size(d));
  return out + "]";
}

bool has_shape(const Tensor& t, const std::vector<int64_t>& shape) {
  if (t.dim() != static_cast<int64_t>(shape.size())) return false;
  int64_t d = 0;
  for (int64_t size : shape)
    if (t.size(d++) != size) return false;
  return true;
}

// A layer call, checked.
struct Call {
  CellId id;
  CellTraits cell;
  Tensor x;
  Tensors state, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr;
  std::vector<bool> reverse;
  bool packed;
  int64_t T, B, I, H, P, N;
  std::vector<int64_t> offsets;  // [T+1] if packed
  ScalarType dtype, compute;

  Steps steps() const { return {T, B, packed ? offsets.data() : nullptr}; }
  int64_t rows() const { return steps().rows(); }
  int64_t slots() const { return std::max(cell.gates, cell.saved); }
  // [rows, width] or [T, B, width]: the shape of outputs.
  Tensor shaped_as_x(const Tensor& t, std::initializer_list<int64_t> tail) const {
    std::vector<int64_t> shape = packed ? std::vector{x.size(0)} : std::vector{T, B};
    shape.insert(shape.end(), tail);
    return torch::stable::view(t, shape);
  }
};

void check_tensor(const Call& call, const char* name, const Tensor& t, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(has_shape(t, shape), name, " has shape ", shape_of(t), ", which does not fit x ",
                  shape_of(call.x), ", hidden size ", call.H, " and batch size ", call.B);
  STD_TORCH_CHECK(t.scalar_type() == call.dtype, name, " and x have different dtypes");
  STD_TORCH_CHECK(t.is_cpu(), name, " and x are on different devices");
}

std::vector<int64_t> offsets_from(const Tensor& batch_sizes, int64_t B, int64_t rows) {
  STD_TORCH_CHECK(batch_sizes.is_cpu(), "batch_sizes must be on the CPU");
  STD_TORCH_CHECK(batch_sizes.scalar_type() == ScalarType::Long, "batch_sizes must be int64");
  STD_TORCH_CHECK(batch_sizes.dim() == 1 && batch_sizes.size(0) > 0,
                  "Expected sequence length to be larger than 0 in RNN");
  const auto* sizes = static_cast<const int64_t*>(batch_sizes.const_data_ptr());
  const int64_t T = batch_sizes.size(0), stride = batch_sizes.stride(0);
  STD_TORCH_CHECK(sizes[0] == B, "batch_sizes[0] is ", sizes[0], ", the state has batch size ", B);
  std::vector<int64_t> offsets(T + 1);
  for (int64_t t = 0; t < T; ++t) {
    const int64_t size = sizes[t * stride];
    STD_TORCH_CHECK(size > 0 && (t == 0 || size <= sizes[(t - 1) * stride]),
                    "batch_sizes must be positive and must not increase");
    offsets[t + 1] = offsets[t] + size;
  }
  STD_TORCH_CHECK(offsets[T] == rows, "batch_sizes add up to ", offsets[T], ", x has ", rows, " rows");
  return offsets;
}

Call check(int64_t cell, Tensor x, Tensors state, Tensors weight_ih, Tensors weight_hh, Tensors bias_ih,
           Tensors bias_hh, Tensors weight_hr, std::vector<bool> reverse,
           const std::optional<Tensor>& batch_sizes) {
  STD_TORCH_CHECK(cell >= 0 && cell < static_cast<int64_t>(std::size(kCells)), "no cell has number ", cell);
  Call call{static_cast<CellId>(cell),
            kCells[cell],
            x,
            state,
            weight_ih,
            weight_hh,
            bias_ih,
            bias_hh,
            weight_hr,
            reverse,
            batch_sizes.has_value(),
            0,
            0,
            0,
            0,
            0,
            0,
            {},
            x.scalar_type(),
            x.scalar_type()};
  const auto N = static_cast<int64_t>(reverse.size());
  const auto fits = [&](const Tensors& list, bool optional) {
    return static_cast<int64_t>(list.size()) == N || (optional && list.empty());
  };
  STD_TORCH_CHECK(N > 0 && fits(weight_ih, false) && fits(weight_hh, false) && fits(bias_ih, true) &&
                      bias_ih.size() == bias_hh.size() && fits(weight_hr, true),
                  "weights must have one tensor per recurrence");
  STD_TORCH_CHECK(static_cast<int>(state.size()) == call.cell.states, call.cell.name, " has ",
                  call.cell.states, " states, got ", state.size());
  STD_TORCH_CHECK(weight_hr.empty() || !call.cell.reads_h, call.cell.name, " has no projection");
  switch (call.dtype) {
    case ScalarType::Float:
    case ScalarType::Double:
      break;
    case ScalarType::BFloat16:
    case ScalarType::Half:
      call.compute = ScalarType::Float;
      break;
    default:
      STD_TORCH_CHECK(false, "x must be float32, float64, bfloat16 or float16");
  }
  STD_TORCH_CHECK(x.is_cpu(), "x must be on the CPU");
  STD_TORCH_CHECK(x.dim() == (call.packed ? 2 : 3), "x must be ", call.packed ? "2-D" : "3-D", ", got ",
                  x.dim(), "-D");
  STD_TORCH_CHECK(
      weight_hh[0].dim() == 2 && weight_hh[0].size(0) > 0 && weight_hh[0].size(0) % call.cell.gates == 0,
      "weight_hh has shape ", shape_of(weight_hh[0]), ", expected [", call.cell.gates, "*H, H]");
  STD_TORCH_CHECK(weight_hr.empty() || weight_hr[0].dim() == 2, "weight_hr must be 2-D");
  STD_TORCH_CHECK(state[0].dim() == 3, "state must be 3-D, got ", state[0].dim(), "-D");
  call.N = N;
  call.I = x.size(-1);
  call.H = weight_hh[0].size(0) / call.cell.gates;
  call.P = weight_hr.empty() ? call.H : weight_hr[0].size(0);
  call.B = state[0].size(1);
  if (call.packed) call.offsets = offsets_from(*batch_sizes, call.B, x.size(0));
  call.T = call.packed ? static_cast<int64_t>(call.offsets.size()) - 1 : x.size(0);
  STD_TORCH_CHECK(call.P > 0, "hidden and projection size must be positive");
  STD_TORCH_CHECK(call.T > 0, "Expected sequence length to be larger than 0 in RNN");
  STD_TORCH_CHECK(call.packed || x.size(1) == call.B, "state has batch size ", call.B, ", x has ", x.size(1));
  const int64_t GH = call.cell.gates * call.H;
  for (const Tensor& t : weight_ih) check_tensor(call, "weight_ih", t, {GH, call.I});
  for (const Tensor& t : weight_hh) check_tensor(call, "weight_hh", t, {GH, call.P});
  for (const Tensor& t : bias_ih) check_tensor(call, "bias_ih", t, {GH});
  for (const Tensor& t : bias_hh) check_tensor(call, "bias_hh", t, {GH});
  for (const Tensor& t : weight_hr) check_tensor(call, "weight_hr", t, {call.P, call.H});
  for (size_t s = 0; s < state.size(); ++s)
    check_tensor(call, s ? "state c" : "state h", state[s], {N, call.B, s ? call.H : call.P});
  return call;
}

ThreadPool torch_pool() {
  return {[](int64_t n, ThreadPool::Body body, void* context) {
    TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, n, 1, body, context));
  }};
}

// Weights as the kernels read them: contiguous and in the compute dtype. Owns what had to be converted.
template <class T>
class KernelWeights {
 public:
  explicit KernelWeights(const Call& call) {
    for (int64_t n = 0; n < call.N; ++n)
      list_.push_back({pointer(call, call.weight_hh, n), pointer(call, call.bias_ih, n),
                       pointer(call, call.bias_hh, n), pointer(call, call.weight_hr, n), call.reverse[n]});
  }
  const Recurrence<T>* get() const { return list_.data(); }

 private:
  const T* pointer(const Call& call, const Tensors& group, int64_t n) {
    if (group.empty()) return nullptr;
    owned_.push_back(torch::stable::contiguous(to_dtype(group[n], call.compute)));
    return static_cast<const T*>(owned_.back().const_data_ptr());
  }
  Tensors owned_;
  std::vector<Recurrence<T>> list_;
};

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <class T>
std::pair<ResidentPlan, std::vector<int64_t>> plan_for(const Call& call) {
  const int64_t lanes = kernels().vector_bytes / sizeof(T);
  const CpuDevice device{torch::stable::get_num_threads(), int64_t{1} << 20};
  ResidentPlan plan = plan_resident(call.N, call.B, call.H, call.cell.gates * call.H * call.P * sizeof(T),
                                    !call.weight_hr.empty(), 4 * lanes, device);
  std::vector<int64_t> bounds = balanced_rows(call.steps(), plan.row_chunks);
  plan.row_bounds = bounds.data();
  return {plan, std::move(bounds)};
}

Rounding rounding_of(ScalarType dtype) {
  if (dtype == ScalarType::BFloat16) return Rounding::kBFloat16;
  if (dtype == ScalarType::Half) return Rounding::kHalf;
  return Rounding::kNone;
}

// x as a matrix of rows in the compute dtype; copies only if strides or dtype ask for it.
Tensor rows_of(const Call& call) {
  const std::array<int64_t, 2> shape{call.rows(), call.I};
  return to_dtype(torch::stable::reshape(call.x, shape), call.compute);
}

// Columns [rows, width] of recurrence n of a buffer [rows, N, slots, H].
Tensor columns_of(const Tensor& buffer, int64_t n, int64_t gates) {
  const std::array<int64_t, 2> shape{buffer.size(0), gates * buffer.size(3)};
  Tensor own = torch::stable::select(buffer, 1, n);
  return torch::stable::view(torch::stable::narrow(own, 1, 0, gates), shape);
}

struct Outputs {
  Tensor y;
  Tensors final, saved;
};

template <class T>
Outputs forward(const Call& call, bool training) {
  const int64_t rows = call.rows(), N = call.N, H = call.H, P = call.P,
                slots = training ? call.slots() : call.cell.gates;
  const bool projected = !call.weight_hr.empty();
  const Tensor gates = empty({rows, N, slots, H}, call.compute);
  if (rows > 0) {
    const Tensor x = rows_of(call);
    for (int64_t n = 0; n < N; ++n)
      mm_out(columns_of(gates, n, call.cell.gates), x,
             torch::stable::transpose(to_dtype(call.weight_ih[n], call.compute), 0, 1));
  }
  const KernelWeights<T> weights(call);
  Outputs out;
  out.y = empty({rows, N * P}, call.compute);
  const Tensor h0 = torch::stable::contiguous(to_dtype(call.state[0], call.compute));
  out.final.push_back(empty({N, call.B, P}, call.compute));
  ForwardParams<T> p{call.steps(),
                     N,
                     H,
                     P,
                     weights.get(),
                     rounding_of(call.dtype),
                     data<T>(gates),
                     slots,
                     training && call.cell.saved > 0,
                     data<T>(h0),
                     data<T>(out.y),
                     data<T>(out.final[0]),
                     {},
                     {}};
  for (int s = 1; s < call.cell.states; ++s) {
    out.final.push_back(copy_as(call.state[s], call.compute));
    p.state[s] = data<T>(out.final[s]);
  }
  if (training) {
    for (int s = projected ? 0 : 1; s < call.cell.states; ++s) {
      const Tensor kept = empty({rows, N, H}, call.compute);
      p.kept[s] = data<T>(kept);
      out.saved.push_back(call.shaped_as_x(kept, {N, H}));
    }
    if (p.keep) out.saved.push_back(call.shaped_as_x(gates, {N, slots, H}));
  }
  if (rows > 0) {
    const auto [plan, bounds] = plan_for<T>(call);
    kernels().of<T>().forward(call.id, p, plan, torch_pool());
  }
  out.y = call.shaped_as_x(to_dtype(out.y, call.dtype), {N * P});
  for (Tensor& t : out.final) t = to_dtype(t, call.dtype);
  return out;
}

Outputs forward(const Call& call, bool training) {
  const NoGrad no_grad;
  return call.compute == ScalarType::Double ? forward<double>(call, training)
                                            : forward<float>(call, training);
}

struct Gradients {
  Tensor dx;
  Tensors dstate, dweight_ih, dweight_hh, dbias_ih, dbias_hh, dweight_hr;
};

Tensor product(const Tensor& a, const Tensor& b) {
  return mm_out(empty({a.size(0), b.size(1)}, a.scalar_type()), a, b);
}

Tensor column_sums(const Tensor& t) {
  const std::array<int64_t, 1> rows{0};
  return torch::stable::sum(t, std::optional<torch::headeronly::IntHeaderOnlyArrayRef>(rows));
}

template <class T>
Gradients backward(const Call& call, const Tensor& y, const Tensors& saved, const std::optional<Tensor>& dy,
                   const Tensors& dfinal, bool need_dx, bool need_dweights) {
  const int64_t rows = call.rows(), N = call.N, H = call.H, P = call.P, G = call.cell.gates;
  const bool projected = !call.weight_hr.empty();
  const KernelWeights<T> weights(call);
  Tensors owned;  // what the kernel's pointers point into
  const auto in = [&](const Tensor& t) {
    owned.push_back(torch::stable::contiguous(to_dtype(t, call.compute)));
    return static_cast<const T*>(owned.back().const_data_ptr());
  };
  const auto out = [&](std::initializer_list<int64_t> sizes) { return empty(sizes, call.compute); };

  const Tensor dgx = out({rows, N, G, H}), dgh = call.cell.same_gates ? dgx : out({rows, N, G, H});
  const Tensor dprojected = out({projected ? rows : 0, N, P});
  const Tensor h_previous = out({need_dweights ? rows : 0, N, P});
  Gradients grads;
  BackwardParams<T> p{};
  p.steps = call.steps();
  p.N = N, p.H = H, p.P = P;
  p.recurrences = weights.get();
  p.slots = call.slots();
  p.h0 = in(call.state[0]);
  p.y = in(y);
  size_t next_saved = 0;
  for (int s = projected ? 0 : 1; s < call.cell.states; ++s) p.kept[s] = in(saved[next_saved++]);
  if (call.cell.saved > 0) p.gates = in(saved[next_saved]);
  for (int s = 1; s < call.cell.states; ++s) p.state0[s] = in(call.state[s]);
  if (dy) p.dy = in(*dy);
  for (int s = 0; s < call.cell.states; ++s) {
    grads.dstate.push_back(copy_as(dfinal[s], call.compute));
    p.dstate[s] = data<T>(grads.dstate[s]);
  }
  p.dgx = data<T>(dgx);
  p.dgh = data<T>(dgh);
  p.dprojected = projected ? data<T>(dprojected) : nullptr;
  p.h_previous = need_dweights ? data<T>(h_previous) : nullptr;
  if (rows > 0) {
    const auto [plan, bounds] = plan_for<T>(call);
    kernels().of<T>().backward(call.id, p, plan, torch_pool());
  }

  const auto finish = [&](const Tensor& t) { return to_dtype(t, call.dtype); };
  const auto product_or_zeros = [&](const Tensor& a, const Tensor& b, const Tensor& like) {
    return rows > 0 ? finish(product(torch::stable::transpose(a, 0, 1), b)) : zeros_like(like, call.dtype);
  };
  const std::array<int64_t, 2> y_rows{rows, N * P}, m_rows{rows, N * H};
  const Tensor x = need_dweights ? rows_of(call) : call.x,
               previous = need_dweights ? torch::stable::view(h_previous, y_rows) : h_previous;
  for (int64_t n = 0; need_dweights && n < N; ++n) {
    Tensor dgx_n = columns_of(dgx, n, G), dgh_n = columns_of(dgh, n, G);
    grads.dweight_ih.push_back(product_or_zeros(dgx_n, x, call.weight_ih[n]));
    Tensor previous_n = torch::stable::narrow(const_cast<Tensor&>(previous), 1, n * P, P);
    grads.dweight_hh.push_back(product_or_zeros(dgh_n, previous_n, call.weight_hh[n]));
    if (!call.bias_ih.empty()) {
      grads.dbias_ih.push_back(finish(column_sums(dgx_n)));
      grads.dbias_hh.push_back(call.cell.same_gates ? copy_as(grads.dbias_ih[n], call.dtype)
                                                    : finish(column_sums(dgh_n)));
    }
    if (projected) {
      Tensor dh = torch::stable::view(dprojected, y_rows), m = torch::stable::reshape(saved[0], m_rows);
      grads.dweight_hr.push_back(product_or_zeros(torch::stable::narrow(dh, 1, n * P, P),
                                                  torch::stable::narrow(m, 1, n * H, H), call.weight_hr[n]));
    }
  }
  for (Tensor& t : grads.dstate) t = finish(t);
  const Tensor dx = out({need_dx ? rows : 0, call.I});
  if (need_dx && rows > 0) {
    const std::array<int64_t, 2> dgx_rows{rows, N * G * H};
    mm_out(dx, torch::stable::view(dgx, dgx_rows), to_dtype(stack_rows(call.weight_ih), call.compute));
  }
  grads.dx = need_dx ? call.shaped_as_x(finish(dx), {call.I}) : empty({0}, call.dtype);
  return grads;
}

using Forwarded = std::tuple<Tensor, Tensors>;
using Trained = std::tuple<Tensor, Tensors, Tensors>;
using Differentiated = std::tuple<Tensor, Tensors, Tensors, Tensors, Tensors, Tensors, Tensors>;

Forwarded sequence(int64_t cell, Tensor x, Tensors state, Tensors weight_ih, Tensors weight_hh,
                   Tensors bias_ih, Tensors bias_hh, Tensors weight_hr, std::vector<bool> reverse,
                   std::optional<Tensor> batch_sizes) {
  Outputs out = forward(
      check(cell, x, state, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, reverse, batch_sizes), false);
  return {out.y, out.final};
}

Trained sequence_forward(int64_t cell, Tensor x, Tensors state, Tensors weight_ih, Tensors weight_hh,
                         Tensors bias_ih, Tensors bias_hh, Tensors weight_hr, std::vector<bool> reverse,
                         std::optional<Tensor> batch_sizes) {
  Outputs out = forward(
      check(cell, x, state, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, reverse, batch_sizes), true);
  return {out.y, out.final, out.saved};
}

Differentiated sequence_backward(int64_t cell, Tensor x, Tensors state, Tensors weight_ih, Tensors weight_hh,
                                 Tensors bias_ih, Tensors bias_hh, Tensors weight_hr,
                                 std::vector<bool> reverse, std::optional<Tensor> batch_sizes, Tensor y,
                                 Tensors saved, std::optional<Tensor> dy, Tensors dfinal, bool need_dx,
                                 bool need_dweights) {
  const Call call =
      check(cell, x, state, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, reverse, batch_sizes);
  const auto fits = [&](const Tensor& t, ScalarType dtype, std::initializer_list<int64_t> tail) {
    std::vector<int64_t> shape = call.packed ? std::vector{call.rows()} : std::vector{call.T, call.B};
    shape.insert(shape.end(), tail);
    return t.is_cpu() && t.scalar_type() == dtype && has_shape(t, shape);
  };
  const size_t kept = call.cell.states - (weight_hr.empty() ? 1 : 0);
  STD_TORCH_CHECK(fits(y, call.dtype, {call.N * call.P}), "y does not fit x");
  STD_TORCH_CHECK(!dy || fits(*dy, call.dtype, {call.N * call.P}), "dy does not fit x");
  STD_TORCH_CHECK(saved.size() == kept + (call.cell.saved > 0),
                  "saved must be what sequence_forward returned");
  for (size_t i = 0; i < saved.size(); ++i)
    STD_TORCH_CHECK(i < kept ? fits(saved[i], call.compute, {call.N, call.H})
                             : fits(saved[i], call.compute, {call.N, call.slots(), call.H}),
                    "saved must be what sequence_forward returned");
  STD_TORCH_CHECK(dfinal.size() == state.size(), "one gradient per state is needed");
  for (size_t s = 0; s < state.size(); ++s)
    check_tensor(call, "dfinal", dfinal[s], {call.N, call.B, s ? call.H : call.P});
  const NoGrad no_grad;
  Gradients g = call.compute == ScalarType::Double
                    ? backward<double>(call, y, saved, dy, dfinal, need_dx, need_dweights)
                    : backward<float>(call, y, saved, dy, dfinal, need_dx, need_dweights);
  return {g.dx, g.dstate, g.dweight_ih, g.dweight_hh, g.dbias_ih, g.dbias_hh, g.dweight_hr};
}

}  // namespace
}  // namespace fusedrnn

#define FUSEDRNN_LAYER                                                                             \
  "int cell, Tensor x, Tensor[] state, Tensor[] weight_ih, Tensor[] weight_hh, Tensor[] bias_ih, " \
  "Tensor[] bias_hh, Tensor[] weight_hr, bool[] reverse, Tensor? batch_sizes"

STABLE_TORCH_LIBRARY(fusedrnn, m) {
  m.def("sequence(" FUSEDRNN_LAYER ") -> (Tensor y, Tensor[] final)");
  m.def("sequence_forward(" FUSEDRNN_LAYER ") -> (Tensor y, Tensor[] final, Tensor[] saved)");
  m.def("sequence_backward(" FUSEDRNN_LAYER
        ", Tensor y, Tensor[] saved, Tensor? dy, Tensor[] dfinal, bool need_dx, bool need_dweights) -> "
        "(Tensor dx, Tensor[] dstate, Tensor[] dweight_ih, Tensor[] dweight_hh, Tensor[] dbias_ih, "
        "Tensor[] dbias_hh, Tensor[] dweight_hr)");
}

STABLE_TORCH_LIBRARY_IMPL(fusedrnn, CPU, m) {
  m.impl("sequence", TORCH_BOX(&fusedrnn::sequence));
  m.impl("sequence_forward", TORCH_BOX(&fusedrnn::sequence_forward));
  m.impl("sequence_backward", TORCH_BOX(&fusedrnn::sequence_backward));
}
