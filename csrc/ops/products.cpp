#include "products.h"

namespace fusedrnn {
namespace {

// a^T b, rounded once to the dtype of the caller's tensors.
Tensor weight_gradient(const Call& call, const Tensor& a, const Tensor& b) {
  const Tensor out = call.empty({a.size(1), b.size(1)}, call.compute);
  multiply(out, transposed(a), b);
  return to_dtype(out, call.dtype);
}

}  // namespace

Tensor operand(const Call& call, const Tensor& t) { return kLibrary.on_cuda ? t : to_dtype(t, call.compute); }

void multiply(const Tensor& out, const Tensor& a, const Tensor& b) {
  if (a.scalar_type() == out.scalar_type())
    call_torch("aten::mm", "out", a, b, out);
  else
    call_torch("aten::mm", "dtype_out", a, b, out.scalar_type(), out);
}

void multiply_input(const Call& call, const Tensor& gates) {
  const Tensor x = operand(call, rows_of(call));
  for (int64_t n = 0; n < call.N; ++n)
    multiply(columns_of(gates, n, call.cell.gates), input_of(call, x, n),
             transposed(operand(call, call.weight_ih[n])));
}

Gradients gradients_of(const Call& call, const Incoming& incoming, Sweep sweep) {
  const int64_t rows = call.rows(), N = call.N, H = call.H, P = call.P, G = call.cell.gates;
  const Tensor dgx = operand(call, sweep.dgx);
  Gradients grads;
  if (incoming.need_dweights) {
    const bool same_gates = call.cell.same_gates, summed = !sweep.dbias_ih.empty();
    Tensor dgh = same_gates ? dgx : operand(call, sweep.dgh);
    Tensor h_previous = view(operand(call, sweep.h_previous), {rows, N * P});
    for (int64_t n = 0; n < N; ++n) {
      const Tensor dgh_n = columns_of(dgh, n, G);
      grads.dweight_hh.push_back(weight_gradient(call, dgh_n, narrow(h_previous, 1, n * P, P)));
      if (!call.bias_ih.empty() && !summed && !same_gates)
        grads.dbias_hh.push_back(to_dtype(column_sums(dgh_n, call.compute), call.dtype));
    }
    // The most memory is in use now: what nothing else needs is free for the other gradients.
    dgh = h_previous = sweep.dgh = sweep.h_previous = Tensor();
    const Tensor x = operand(call, rows_of(call));
    for (int64_t n = 0; n < N; ++n) {
      const Tensor dgx_n = columns_of(dgx, n, G);
      grads.dweight_ih.push_back(weight_gradient(call, dgx_n, input_of(call, x, n)));
      if (summed) {
        grads.dbias_ih.push_back(to_dtype(sweep.dbias_ih[n], call.dtype));
        grads.dbias_hh.push_back(to_dtype(sweep.dbias_hh[n], call.dtype));
      } else if (!call.bias_ih.empty()) {
        const Tensor sums = column_sums(dgx_n, call.compute);
        grads.dbias_ih.push_back(to_dtype(sums, call.dtype));
        if (same_gates) grads.dbias_hh.push_back(copy_as(sums, call.dtype));
      }
      if (call.projected()) {
        const Tensor dh = view(sweep.dprojected, {rows, N * P}),
                     m = torch::stable::reshape(incoming.saved[0], std::array<int64_t, 2>{rows, N * H});
        grads.dweight_hr.push_back(weight_gradient(call, narrow(dh, 1, n * P, P), narrow(m, 1, n * H, H)));
      }
    }
  }
  for (const Tensor& t : sweep.dstate) grads.dstate.push_back(to_dtype(t, call.dtype));
  if (incoming.need_dx) {
    // Rounded like any product of torch: a second buffer in fp32 would be as large as the input.
    const Tensor dx = call.empty({rows, call.K * call.I}, dgx.scalar_type());
    const int64_t each = N / call.K;  // recurrences of an input
    for (int64_t n = 0; n < N; n += each) {
      const Tensor weights = cat({call.weight_ih.begin() + n, call.weight_ih.begin() + n + each}, 0);
      multiply(input_of(call, dx, n), narrow(view(dgx, {rows, N * G * H}), 1, n * G * H, each * G * H),
               operand(call, weights));
    }
    grads.dx = call.shaped_as_x(to_dtype(dx, call.dtype), {call.K * call.I});
  } else {
    grads.dx = call.empty({0}, call.dtype);
  }
  return grads;
}

}  // namespace fusedrnn
