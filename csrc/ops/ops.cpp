// Cells are numbers in the schemas, not names: the stable ABI's conversion of strings leaks each one (torch
// 2.13).
#include "ops.h"

#include <tuple>
#include <utility>

#define FUSEDRNN_LAYER                                                                             \
  "int cell, Tensor x, Tensor[] state, Tensor[] weight_ih, Tensor[] weight_hh, Tensor[] bias_ih, " \
  "Tensor[] bias_hh, Tensor[] weight_hr, bool[] reverse, Tensor? batch_sizes, bool tf32"

namespace fusedrnn {
namespace {

using Forwarded = std::tuple<Tensor, Tensors>;
using Trained = std::tuple<Tensor, Tensors, Tensors>;
using Differentiated = std::tuple<Tensor, Tensors, Tensors, Tensors, Tensors, Tensors, Tensors, Tensors>;

Forwarded sequence(int64_t cell, Tensor x, Tensors state, Tensors weight_ih, Tensors weight_hh,
                   Tensors bias_ih, Tensors bias_hh, Tensors weight_hr, std::vector<bool> reverse,
                   std::optional<Tensor> batch_sizes, bool tf32, std::optional<Tensors> param) {
  const Call call = with_params(check(cell, std::move(x), std::move(state), std::move(weight_ih),
                                      std::move(weight_hh), std::move(bias_ih), std::move(bias_hh),
                                      std::move(weight_hr), std::move(reverse), batch_sizes, tf32),
                                param.value_or(Tensors{}));
  const NoGrad no_grad;
  Outputs out = forward(call, false);
  return {out.y, std::move(out.final)};
}

Trained sequence_forward(int64_t cell, Tensor x, Tensors state, Tensors weight_ih, Tensors weight_hh,
                         Tensors bias_ih, Tensors bias_hh, Tensors weight_hr, std::vector<bool> reverse,
                         std::optional<Tensor> batch_sizes, bool tf32, std::optional<Tensors> param) {
  const Call call = with_params(check(cell, std::move(x), std::move(state), std::move(weight_ih),
                                      std::move(weight_hh), std::move(bias_ih), std::move(bias_hh),
                                      std::move(weight_hr), std::move(reverse), batch_sizes, tf32),
                                param.value_or(Tensors{}));
  const NoGrad no_grad;
  Outputs out = forward(call, true);
  return {out.y, std::move(out.final), std::move(out.saved)};
}

Differentiated sequence_backward(int64_t cell, Tensor x, Tensors state, Tensors weight_ih, Tensors weight_hh,
                                 Tensors bias_ih, Tensors bias_hh, Tensors weight_hr,
                                 std::vector<bool> reverse, std::optional<Tensor> batch_sizes, bool tf32,
                                 Tensor y, Tensors saved, std::optional<Tensor> dy, Tensors dfinal,
                                 bool need_dx, bool need_dweights, std::optional<Tensors> dkept,
                                 std::optional<Tensors> param) {
  const Call call = with_params(check(cell, std::move(x), std::move(state), std::move(weight_ih),
                                      std::move(weight_hh), std::move(bias_ih), std::move(bias_hh),
                                      std::move(weight_hr), std::move(reverse), batch_sizes, tf32),
                                param.value_or(Tensors{}));
  const Incoming incoming{y, saved, dy, dfinal, need_dx, need_dweights, dkept.value_or(Tensors{})};
  check(call, incoming);
  const NoGrad no_grad;
  Gradients g = backward(call, incoming);
  return {g.dx, g.dstate, g.dweight_ih, g.dweight_hh, g.dbias_ih, g.dbias_hh, g.dweight_hr, g.dparam};
}

std::vector<int64_t> plan(int64_t cell, Tensor x, Tensors state, Tensors weight_ih, Tensors weight_hh,
                          Tensors bias_ih, Tensors bias_hh, Tensors weight_hr, std::vector<bool> reverse,
                          std::optional<Tensor> batch_sizes, bool tf32, bool backward) {
  return plan_of(check(cell, std::move(x), std::move(state), std::move(weight_ih), std::move(weight_hh),
                       std::move(bias_ih), std::move(bias_hh), std::move(weight_hr), std::move(reverse),
                       batch_sizes, tf32),
                 backward);
}

}  // namespace

void define_ops(torch::stable::detail::StableLibrary& library) {
  library.def("sequence(" FUSEDRNN_LAYER ", Tensor[]? param=None) -> (Tensor y, Tensor[] final)");
  library.def("sequence_forward(" FUSEDRNN_LAYER
              ", Tensor[]? param=None) -> (Tensor y, Tensor[] final, Tensor[] saved)");
  library.def(
      "sequence_backward(" FUSEDRNN_LAYER
      ", Tensor y, Tensor[] saved, Tensor? dy, Tensor[] dfinal, bool need_dx, bool need_dweights, "
      "Tensor[]? dkept=None, Tensor[]? param=None) -> (Tensor dx, Tensor[] dstate, Tensor[] dweight_ih, "
      "Tensor[] dweight_hh, Tensor[] dbias_ih, "
      "Tensor[] dbias_hh, Tensor[] dweight_hr, Tensor[] dparam)");
  library.def("plan(" FUSEDRNN_LAYER ", bool backward) -> int[]");
}

void implement_ops(torch::stable::detail::StableLibrary& library) {
  library.impl("sequence", TORCH_BOX(&sequence));
  library.impl("sequence_forward", TORCH_BOX(&sequence_forward));
  library.impl("sequence_backward", TORCH_BOX(&sequence_backward));
  library.impl("plan", TORCH_BOX(&plan));
}

}  // namespace fusedrnn
