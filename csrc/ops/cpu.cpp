// The ops by the CPU kernels.
#include <cstring>

#include "../cpu/kernels.h"
#include "products.h"

namespace fusedrnn {
namespace {

// Weights as the kernels read them: contiguous and in the compute dtype, or some of them in bfloat16 if that
// is allowed. Owns what had to be converted.
template <class T>
class KernelWeights {
 public:
  explicit KernelWeights(const Call& call, bool allow_narrow) {
    const bool narrow = allow_narrow && call.dtype == ScalarType::BFloat16;
    for (int64_t n = 0; n < call.N; ++n)
      list_.push_back({matrix(call, call.weight_ih, n, narrow), matrix(call, call.weight_hh, n, narrow),
                       pointer(call, call.bias_ih, n), pointer(call, call.bias_hh, n),
                       pointer(call, call.weight_hr, n), call.first_feature(n), call.reverse[n],
                       pointer(call, call.param, n)});
  }
  const Recurrence<T>* get() const { return list_.data(); }

 private:
  const T* pointer(const Call& call, const Tensors& group, int64_t n) {
    if (group.empty()) return nullptr;
    owned_.push_back(dense(to_dtype(group[n], call.compute)));
    return const_data<T>(owned_.back());
  }
  Matrix<T> matrix(const Call& call, const Tensors& group, int64_t n, bool narrow) {
    if (!narrow) return {pointer(call, group, n), nullptr};
    owned_.push_back(dense(group[n]));
    return {nullptr, const_data<BFloat16>(owned_.back())};
  }
  Tensors owned_;
  std::vector<Recurrence<T>> list_;
};

// The plan of a call, and torch's threads; for work that would be done before they have started, the thread
// that is running.
struct Schedule {
  int64_t threads = 1;
  std::vector<int64_t> bounds;
  ResidentPlan plan;
  ThreadPool pool;

  Schedule(const Call& call, int64_t lanes, int64_t element_bytes) {
    const double work = 1.0 * call.rows() * call.N * call.cell.gates * call.H * (call.I + call.P);
    if (work >= 1 << 19) threads = torch::stable::get_num_threads();
    const CpuDevice device{threads, int64_t{1} << 20};
    plan = plan_resident(call.N, call.B, call.H, call.cell.gates * call.H * call.P * element_bytes,
                         call.projected(), 4 * lanes, device);
    bounds = balanced_rows(call.steps(), plan.row_chunks);
    plan.row_bounds = bounds.data();
    if (threads == 1 || call.N * plan.row_chunks * plan.unit_slices == 1)
      pool.parallel_for = [](int64_t n, ThreadPool::Body body, void* context) { body(0, n, context); };
    else
      pool.parallel_for = [](int64_t n, ThreadPool::Body body, void* context) {
        TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, n, 1, body, context));
      };
  }
  Schedule(const Schedule&) = delete;  // the plan points into the bounds
};

template <class T>
Schedule schedule_of(const Call& call, bool backward) {
  const bool pairs =  // of bfloat16, as the weights came
      !backward && call.dtype == ScalarType::BFloat16 && kernels().isa == Isa::avx512bf16;
  return Schedule(call, kernels().vector_bytes / sizeof(T), pairs ? sizeof(BFloat16) : sizeof(T));
}

// A copy in the compute dtype.
Tensor copied(const Call& call, const Tensor& t) {
  const Tensor source = dense(to_dtype(t, call.compute));
  const Tensor out = empty(source, source.sizes(), call.compute);
  std::memcpy(data(out), const_data(source), source.numel() * (call.compute == ScalarType::Double ? 8 : 4));
  return out;
}

Rounding rounding_of(ScalarType dtype) {
  if (dtype == ScalarType::BFloat16) return Rounding::kBFloat16;
  if (dtype == ScalarType::Half) return Rounding::kHalf;
  return Rounding::kNone;
}

template <class T>
Outputs forward(const Call& call, bool training) {
  const int64_t N = call.N, H = call.H, P = call.P;
  const KernelWeights<T> weights(call, true);
  Tensor x = to_dtype(call.x, call.compute);
  if (x.size(-1) > 1 && x.stride(-1) != 1) x = dense(x);
  Outputs out;
  out.y = call.empty_as_x({N * P}, call.compute);
  const Tensor h0 = dense(to_dtype(call.state[0], call.compute));
  out.final.push_back(call.empty({N, call.B, P}, call.compute));
  ForwardParams<T> p{call.steps(),
                     N,
                     call.I,
                     H,
                     P,
                     weights.get(),
                     rounding_of(call.dtype),
                     const_data<T>(x),
                     x.stride(0),
                     x.stride(-2),
                     nullptr,
                     call.slots(),
                     data<T>(h0),
                     data<T>(out.y),
                     data<T>(out.final[0]),
                     {},
                     {}};
  for (int s = 1; s < call.cell.states; ++s) {
    out.final.push_back(copied(call, call.state[s]));
    p.state[s] = data<T>(out.final[s]);
  }
  if (training) {
    for (int s = call.projected() ? 0 : 1; s < call.cell.states; ++s) {
      out.saved.push_back(call.empty_as_x({N, H}, call.compute));
      p.kept[s] = data<T>(out.saved.back());
    }
    if (call.cell.saved > 0) {
      out.saved.push_back(call.empty_as_x({N, p.slots, H}, call.compute));
      p.gates = data<T>(out.saved.back());
    }
  }
  if (call.rows() > 0) {
    const Schedule schedule = schedule_of<T>(call, false);
    kernels().of<T>().forward(call.id, p, schedule.plan, schedule.pool);
  }
  out.y = to_dtype(out.y, call.dtype);
  for (Tensor& t : out.final) t = to_dtype(t, call.dtype);
  return out;
}

template <class T>
Gradients backward(const Call& call, const Incoming& incoming) {
  const int64_t rows = call.rows(), N = call.N, H = call.H, P = call.P, G = call.cell.gates;
  const KernelWeights<T> weights(call, false);
  Tensors owned;  // what the kernel's pointers point into
  const auto in = [&](const Tensor& t) {
    owned.push_back(dense(to_dtype(t, call.compute)));
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
    sweep.dstate.push_back(copied(call, incoming.dfinal[s]));
    p.dstate[s] = data<T>(sweep.dstate[s]);
  }
  for (size_t i = 0; i < incoming.dkept.size(); ++i) p.dkept[i + 1] = in(incoming.dkept[i]);
  std::optional<Tensor> dparam;
  if (call.cell.params) {
    dparam = call.zeros({N, call.B, call.cell.params, H}, call.compute);
    p.dparam = data<T>(*dparam);
  }
  p.dgx = data<T>(sweep.dgx);
  p.dgh = data<T>(sweep.dgh);
  p.dprojected = call.projected() ? data<T>(sweep.dprojected) : nullptr;
  p.h_previous = incoming.need_dweights ? data<T>(sweep.h_previous) : nullptr;
  std::vector<T*> dbias_ih, dbias_hh;
  if (rows > 0 && incoming.need_dweights && !call.bias_ih.empty()) {
    for (int64_t n = 0; n < N; ++n) {
      sweep.dbias_ih.push_back(out({G * H}));
      sweep.dbias_hh.push_back(out({G * H}));
      dbias_ih.push_back(data<T>(sweep.dbias_ih.back()));
      dbias_hh.push_back(data<T>(sweep.dbias_hh.back()));
    }
    p.dbias_ih = dbias_ih.data();
    p.dbias_hh = dbias_hh.data();
  }
  if (rows > 0) {
    const Schedule schedule = schedule_of<T>(call, true);
    kernels().of<T>().backward(call.id, p, schedule.plan, schedule.pool);
  }
  Gradients grads = gradients_of(call, incoming, std::move(sweep));
  for (int64_t n = 0; incoming.need_dweights && dparam && n < N; ++n)
    grads.dparam.push_back(to_dtype(column_sums(select(*dparam, n), call.compute), call.dtype));
  return grads;
}

}  // namespace

const Library kLibrary{.on_cuda = false, .on_cpu_schedule = true, .keeps_gates = true};

Outputs forward(const Call& call, bool training) {
  return call.compute == ScalarType::Double ? forward<double>(call, training)
                                            : forward<float>(call, training);
}

Gradients backward(const Call& call, const Incoming& incoming) {
  return call.compute == ScalarType::Double ? backward<double>(call, incoming)
                                            : backward<float>(call, incoming);
}

// Threads, chunks of the batch, slices of the hidden units, bytes of a vector, the instruction set.
std::vector<int64_t> plan_of(const Call& call, bool backward) {
  const Schedule schedule = call.compute == ScalarType::Double ? schedule_of<double>(call, backward)
                                                               : schedule_of<float>(call, backward);
  return {schedule.threads, schedule.plan.row_chunks, schedule.plan.unit_slices, kernels().vector_bytes,
          static_cast<int64_t>(kernels().isa)};
}

}  // namespace fusedrnn

STABLE_TORCH_LIBRARY(fusedrnn, m) { fusedrnn::define_ops(m); }
STABLE_TORCH_LIBRARY_IMPL(fusedrnn, CPU, m) { fusedrnn::implement_ops(m); }
