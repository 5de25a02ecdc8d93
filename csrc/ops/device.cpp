// The ops by the schedules of csrc/cuda: for CUDA tensors, or with FUSEDRNN_EMULATOR for CPU tensors through
// the emulator, as ops of a namespace of their own.
//
// No gates are kept. h of every step is known once the forward has ended, so the backward computes all gates
// again in one product.
#include "stepwise.h"

#if !defined(FUSEDRNN_EMULATOR)
#include <torch/csrc/stable/accelerator.h>
#endif

namespace fusedrnn {
namespace {

using namespace cuda;

#if defined(FUSEDRNN_EMULATOR)
struct OnDevice : Place {
  explicit OnDevice(const Call&) : Place{0, nullptr} {}
};
#else
// Makes the device of a call's tensors the current one.
class OnDevice : public Place {
 public:
  explicit OnDevice(const Call& call) : Place{call.x.get_device_index(), nullptr}, guard_(device) {
    set_device(device);
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};
#endif

// Arguments as the kernels read them: contiguous, and batch offsets on the device. Owns what was copied.
class Arguments {
 public:
  Arguments(const Call& call, const Place& place) : steps_(call.steps()) {
    for (int64_t n = 0; n < call.N; ++n)
      weights_.push_back({at(call.weight_hh, n), at(call.bias_ih, n), at(call.bias_hh, n), call.reverse[n]});
    if (call.packed) {
      owned_.push_back(call.empty({call.T + 1}, ScalarType::Long));
      upload(call.offsets.data(), call.T + 1, data<int64_t>(owned_.back()), place.stream);
      steps_.offsets = const_data<int64_t>(owned_.back());
    }
  }
  Steps steps() const { return steps_; }
  const Weights* weights() const { return weights_.data(); }
  const void* in(const Tensor& t) {
    owned_.push_back(torch::stable::contiguous(t));
    return const_data(owned_.back());
  }

 private:
  const void* at(const Tensors& group, int64_t n) { return group.empty() ? nullptr : in(group[n]); }
  Steps steps_;
  Tensors owned_;
  std::vector<Weights> weights_;
};

// What both passes tell the kernels.
template <class Pass>
Pass pass_for(const Call& call, const Arguments& arguments) {
  Pass pass{};
  pass.cell = call.id;
  pass.number = number_of(call.dtype);
  pass.tf32 = call.tf32;
  pass.steps = arguments.steps();
  pass.N = call.N;
  pass.H = call.H;
  pass.weights = arguments.weights();
  return pass;
}

// Recomputes the gates: W_ih x + W_hh h into gx, or W_hh h apart into gh.
void multiply_gates(const Call& call, const Tensor& h_previous, const Tensor& gx, const Tensor& gh) {
  const int64_t N = call.N, P = call.P, G = call.cell.gates;
  const Tensor h = operand(call, view(h_previous, {call.rows(), N * P}));
  const auto h_of = [&](int64_t n) { return narrow(h, 1, n * P, P); };
  if (call.cell.same_gates) {
    const Tensor x = operand(call, rows_of(call));
    for (int64_t n = 0; n < N; ++n)
      multiply(columns_of(gx, n, G), cat({input_of(call, x, n), h_of(n)}, 1),
               transposed(operand(call, cat({call.weight_ih[n], call.weight_hh[n]}, 1))));
  } else {
    multiply_input(call, gx);
    for (int64_t n = 0; n < N; ++n)
      multiply(columns_of(gh, n, G), h_of(n), transposed(operand(call, call.weight_hh[n])));
  }
}

}  // namespace

#if defined(FUSEDRNN_EMULATOR)
const Library kLibrary{.on_cuda = false, .on_cpu_schedule = false, .keeps_gates = false};
#else
const Library kLibrary{.on_cuda = true, .on_cpu_schedule = false, .keeps_gates = false};
#endif

Outputs forward(const Call& call, bool training) {
  const int64_t rows = call.rows(), N = call.N, H = call.H;
  const bool projected = call.projected();
  const OnDevice place(call);
  check_earlier_launches(place);
  Arguments arguments(call, place);
  const Tensor gx = call.empty({rows, N, call.cell.gates, H}, call.compute),
               y = call.empty({rows, N, call.P}, call.dtype),
               unprojected = call.empty({projected ? rows : 0, N, H}, call.compute);
  multiply_input(call, gx);
  auto p = pass_for<cuda::Forward>(call, arguments);
  p.gx = const_data(gx);
  p.y = projected ? nullptr : data(y);
  Outputs out{.y = call.shaped_as_x(y, {N * call.P}), .final = {}, .saved = {}};
  if (training && projected) out.saved.push_back(call.shaped_as_x(unprojected, {N, H}));
  for (int s = 1; training && s < call.cell.states; ++s) {
    const Tensor kept = call.empty({rows, N, H}, call.compute);
    p.kept[s] = data(kept);
    out.saved.push_back(call.shaped_as_x(kept, {N, H}));
  }
  if (rows == 0) {
    for (const Tensor& t : call.state) out.final.push_back(copy_as(t, call.dtype));
  } else if (const std::optional<PersistentPlan> plan = choose_plan(call, false, place)) {
    for (int s = 0; s < call.cell.states; ++s) {
      out.final.push_back(call.empty({N, call.B, H}, call.dtype));
      p.state0[s] = arguments.in(call.state[s]);
      p.final_state[s] = data(out.final[s]);
    }
    launch(call, p, *plan, place);
  } else {
    out.final = run_steps(call, p, y, unprojected, place.stream);
  }
  return out;
}

Gradients backward(const Call& call, const Incoming& incoming) {
  const int64_t rows = call.rows(), N = call.N, H = call.H, P = call.P, G = call.cell.gates;
  const bool projected = call.projected(), apart = !call.cell.same_gates, recomputes = call.cell.saved > 0;
  const OnDevice place(call);
  check_earlier_launches(place);
  Arguments arguments(call, place);
  const auto gates = [&](bool wanted, ScalarType dtype) {
    return call.empty({wanted ? rows : 0, N, G, H}, dtype);
  };
  const Tensor gx = gates(recomputes, call.compute), gh = gates(recomputes && apart, call.compute),
               dgx = gates(true, call.dtype);
  Sweep sweep{.dgx = dgx,
              .dgh = apart ? gates(true, call.dtype) : dgx,
              .h_previous = call.empty({rows, N, P}, call.dtype),
              .dprojected = call.empty({projected ? rows : 0, N, P}, call.compute)};
  // A projection's h is not the kernel's, which gets a gradient dh of its own and leaves none for h0.
  const Tensor no_dh0 = call.empty({N, projected ? call.B : 0, H}, call.dtype);
  auto p = pass_for<cuda::Backward>(call, arguments);
  p.gx = recomputes ? const_data(gx) : nullptr;
  p.gh = recomputes && apart ? const_data(gh) : nullptr;
  p.dgx = data(dgx);
  p.dgh = apart ? data(sweep.dgh) : nullptr;
  if (!projected) {
    p.h_previous = const_data(sweep.h_previous);
    p.y = arguments.in(incoming.y);
    p.dy = incoming.dy ? arguments.in(*incoming.dy) : nullptr;
  }
  for (int s = 0; s < call.cell.states; ++s) {
    sweep.dstate.push_back(call.empty({N, call.B, s ? H : P}, call.dtype));
    p.dstate0[s] = data(projected && s == 0 ? no_dh0 : sweep.dstate[s]);
    p.dfinal[s] = arguments.in(incoming.dfinal[s]);
    if (s > 0) p.state0[s] = arguments.in(call.state[s]);
    if (s > 0 || projected) p.kept[s] = arguments.in(incoming.saved[projected ? s : s - 1]);
  }
  if (rows > 0) {
    previous_rows(p.number, p.steps, rows, N, P, p.weights, arguments.in(call.state[0]),
                  arguments.in(incoming.y), data(sweep.h_previous), place.stream);
    if (recomputes) multiply_gates(call, sweep.h_previous, gx, gh);
    if (const std::optional<PersistentPlan> plan = choose_plan(call, true, place))
      launch(call, p, *plan, place);
    else
      run_steps(call, p, incoming.dy, incoming.dfinal, sweep, place.stream);
  }
  return gradients_of(call, incoming, std::move(sweep));
}

std::vector<int64_t> plan_of(const Call& call, bool backward) {
  const OnDevice place(call);
  return candidates(call, backward, place);
}

}  // namespace fusedrnn

#if defined(FUSEDRNN_EMULATOR)
STABLE_TORCH_LIBRARY(fusedrnn_emulator, m) { fusedrnn::define_ops(m); }
STABLE_TORCH_LIBRARY_IMPL(fusedrnn_emulator, CPU, m) { fusedrnn::implement_ops(m); }
#else
STABLE_TORCH_LIBRARY_IMPL(fusedrnn, CUDA, m) { fusedrnn::implement_ops(m); }
#endif
