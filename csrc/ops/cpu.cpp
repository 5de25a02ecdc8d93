// The ops by the CPU kernels.
#include "../cpu/kernels.h"
#include "products.h"

namespace fusedrnn {
namespace {

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
    return const_data<T>(owned_.back());
  }
  Tensors owned_;
  std::vector<Recurrence<T>> list_;
};

template <class T>
std::pair<ResidentPlan, std::vector<int64_t>> plan_for(const Call& call) {
  const int64_t lanes = kernels().vector_bytes / sizeof(T);
  const CpuDevice device{torch::stable::get_num_threads(), int64_t{1} << 20};
  ResidentPlan plan = plan_resident(call.N, call.B, call.H, call.cell.gates * call.H * call.P * sizeof(T),
                                    call.projected(), 4 * lanes, device);
  std::vector<int64_t> bounds = balanced_rows(call.steps(), plan.row_chunks);
  plan.row_bounds = bounds.data();
  return {plan, std::move(bounds)};
}

Rounding rounding_of(ScalarType dtype) {
  if (dtype == ScalarType::BFloat16) return Rounding::kBFloat16;
  if (dtype == ScalarType::Half) return Rounding::kHalf;
  return Rounding::kNone;
}

template <class T>
Outputs forward(const Call& call, bool training) {
  const int64_t rows = call.rows(), N = call.N, H = call.H, P = call.P,
                slots = training ? call.slots() : call.cell.gates;
  const Tensor gates = call.empty({rows, N, slots, H}, call.compute);
  multiply_input(call, gates);
  const KernelWeights<T> weights(call);
  Outputs out;
  out.y = call.empty({rows, N * P}, call.compute);
  const Tensor h0 = torch::stable::contiguous(to_dtype(call.state[0], call.compute));
  out.final.push_back(call.empty({N, call.B, P}, call.compute));
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
    for (int s = call.projected() ? 0 : 1; s < call.cell.states; ++s) {
      const Tensor kept = call.empty({rows, N, H}, call.compute);
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

template <class T>
Gradients backward(const Call& call, const Incoming& incoming) {
  const int64_t rows = call.rows(), N = call.N, H = call.H, P = call.P, G = call.cell.gates;
  const KernelWeights<T> weights(call);
  Tensors owned;  // what the kernel's pointers point into
  const auto in = [&](const Tensor& t) {
    owned.push_back(torch::stable::contiguous(to_dtype(t, call.compute)));
    return const_data<T>(owned.back());
  };
  const auto out = [&](std::initializer_list<int64_t> sizes) { return call.empty(sizes, call.compute); };

  const Tensor dgx = out({rows, N, G, H});
  Sweep sweep{.dgx = dgx,
              .dgh = call.cell.same_gates ? dgx : out({rows, N, G, H}),
              .h_previous = out({incoming.need_dweights ? rows : 0, N, P}),
              .dprojected = out({call.projected() ? rows : 0, N, P})};
  BackwardParams<T> p{};
  p.steps = call.steps();
  p.N = N, p.H = H, p.P = P;
  p.recurrences = weights.get();
  p.slots = call.slots();
  p.h0 = in(call.state[0]);
  p.y = in(incoming.y);
  size_t next_saved = 0;
  for (int s = call.projected() ? 0 : 1; s < call.cell.states; ++s)
    p.kept[s] = in(incoming.saved[next_saved++]);
  if (call.cell.saved > 0) p.gates = in(incoming.saved[next_saved]);
  for (int s = 1; s < call.cell.states; ++s) p.state0[s] = in(call.state[s]);
  if (incoming.dy) p.dy = in(*incoming.dy);
  for (int s = 0; s < call.cell.states; ++s) {
    sweep.dstate.push_back(copy_as(incoming.dfinal[s], call.compute));
    p.dstate[s] = data<T>(sweep.dstate[s]);
  }
  p.dgx = data<T>(sweep.dgx);
  p.dgh = data<T>(sweep.dgh);
  p.dprojected = call.projected() ? data<T>(sweep.dprojected) : nullptr;
  p.h_previous = incoming.need_dweights ? data<T>(sweep.h_previous) : nullptr;
  if (rows > 0) {
    const auto [plan, bounds] = plan_for<T>(call);
    kernels().of<T>().backward(call.id, p, plan, torch_pool());
  }
  return gradients_of(call, incoming, sweep);
}

}  // namespace

const Library kLibrary{.on_cuda = false, .keeps_gates = true};

Outputs forward(const Call& call, bool training) {
  return call.compute == ScalarType::Double ? forward<double>(call, training)
                                            : forward<float>(call, training);
}

Gradients backward(const Call& call, const Incoming& incoming) {
  return call.compute == ScalarType::Double ? backward<double>(call, incoming)
                                            : backward<float>(call, incoming);
}

}  // namespace fusedrnn

STABLE_TORCH_LIBRARY(fusedrnn, m) { fusedrnn::define_ops(m); }
STABLE_TORCH_LIBRARY_IMPL(fusedrnn, CPU, m) { fusedrnn::implement_ops(m); }
