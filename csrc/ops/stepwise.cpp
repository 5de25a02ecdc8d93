#include "stepwise.h"

namespace fusedrnn::cuda {
namespace {

// The sequences of a batch that are alive come first.
Tensor alive(const Tensor& t, int64_t count) { return count == t.size(0) ? t : narrow(t, 0, 0, count); }

// The rows of one step that belong to recurrence n of a buffer [rows, N, ...], as [count, width].
struct Rows {
  const Call& call;
  int64_t offset, count;
  Rows(const Call& call, int64_t t)
      : call(call), offset(call.steps().offset(t)), count(call.steps().count(t)) {}
  Tensor of(const Tensor& buffer, int64_t n) const {
    const int64_t width = buffer.stride(0) / call.N;
    return strided(buffer, std::array<int64_t, 2>{count, width}, std::array<int64_t, 2>{buffer.stride(0), 1},
                   offset * buffer.stride(0) + n * width);
  }
};

// What is multiplied with weights at every step, prepared once.
template <class F>
Tensors each(const Tensors& weights, F prepare) {
  Tensors out;
  for (const Tensor& t : weights) out.push_back(prepare(t));
  return out;
}

}  // namespace

Tensors run_steps(const Call& call, const Forward& forward, const Tensor& y, const Tensor& unprojected,
                  void* stream) {
  const int64_t T = call.T, N = call.N, B = call.B, G = call.cell.gates, H = call.H;
  const Tensors weight_hh =
      each(call.weight_hh, [&](const Tensor& t) { return transposed(operand(call, t)); });
  const Tensors weight_hr =
      each(call.weight_hr, [&](const Tensor& t) { return transposed(to_dtype(t, call.compute)); });
  Tensors state;
  for (int s = 0; s < call.cell.states; ++s)
    state.push_back(copy_as(call.state[s], s ? call.compute : call.dtype));
  const Tensor gh = call.empty({N, B, G * H}, call.compute);

  StepForward step{};
  step.gh = data(gh);
  step.projected_from = call.projected() ? data(unprojected) : nullptr;
  for (int s = 0; s < call.cell.states; ++s) step.state[s] = data(state[s]);
  for (step.s = 0; step.s < T; ++step.s) {
    const auto rows_of_step = [&](int64_t n) {
      return Rows(call, call.reverse[n] ? T - 1 - step.s : step.s);
    };
    for (int64_t n = 0; n < N; ++n) {
      const int64_t count = rows_of_step(n).count;
      multiply(alive(select(gh, n), count), operand(call, alive(select(state[0], n), count)), weight_hh[n]);
    }
    run(forward, step, stream);
    for (int64_t n = 0; call.projected() && n < N; ++n) {
      const Rows rows = rows_of_step(n);
      const Tensor h = call.empty({rows.count, call.P}, call.compute);
      multiply(h, rows.of(unprojected, n), weight_hr[n]);
      for (Tensor target : {alive(select(state[0], n), rows.count), rows.of(y, n)})
        torch::stable::copy_(target, h);
    }
  }
  for (Tensor& t : state) t = to_dtype(t, call.dtype);
  return state;
}

void run_steps(const Call& call, const Backward& backward, const std::optional<Tensor>& dy,
               const Tensors& dfinal, Sweep& sweep, void* stream) {
  const int64_t T = call.T, N = call.N, B = call.B, H = call.H;
  const bool projected = call.projected();
  const Tensors weight_hh = each(call.weight_hh, [&](const Tensor& t) { return operand(call, t); });
  const Tensors weight_hr = each(call.weight_hr, [&](const Tensor& t) { return to_dtype(t, call.compute); });
  Tensors dstate;
  for (const Tensor& t : dfinal) dstate.push_back(copy_as(t, call.compute));
  // A step's products leave `carried` for the step before it. That is the kernel's dh, unless a projection
  // stands between: then dy and the gradient of the final h are added here, not by the kernel.
  const Tensor dh = call.zeros({N, B, H}, call.compute), carried = projected ? dstate[0] : dh;
  if (projected) dstate[0] = call.zeros({N, B, H}, call.compute);
  std::optional<Tensor> dy_rows;
  if (projected && dy)
    dy_rows = torch::stable::reshape(dense(*dy), std::array<int64_t, 3>{call.rows(), N, call.P});

  StepBackward step{};
  step.dh = data(dh);
  for (int s = 0; s < call.cell.states; ++s) step.dstate[s] = data(dstate[s]);
  for (step.s = 0; step.s < T; ++step.s) {
    const auto rows_of_step = [&](int64_t n) {
      return Rows(call, call.reverse[n] ? step.s : T - 1 - step.s);
    };
    for (int64_t n = 0; projected && n < N; ++n) {
      const Rows rows = rows_of_step(n);
      const Tensor later = alive(select(carried, n), rows.count);
      Tensor d = rows.of(sweep.dprojected, n);
      torch::stable::copy_(d, dy_rows ? add(later, rows.of(*dy_rows, n)) : later);
      multiply(alive(select(dh, n), rows.count), d, weight_hr[n]);
    }
    run(backward, step, stream);
    for (int64_t n = 0; n < N; ++n) {
      const Rows rows = rows_of_step(n);
      multiply(alive(select(carried, n), rows.count), operand(call, rows.of(sweep.dgh, n)), weight_hh[n]);
    }
  }
  run(backward, step, stream);
  if (projected) sweep.dstate[0] = carried;
}

}  // namespace fusedrnn::cuda
