#include "call.h"

#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../cells/rnn.h"
#include "ops.h"

namespace fusedrnn {
namespace {

template <class Cell>
constexpr CellTraits traits_of(const char* name) {
  return {name, Cell::kGates, Cell::kStates, Cell::kSaved, params_of<Cell>, Cell::kSameGates, Cell::kReadsH};
}

constexpr CellTraits kCells[] = {traits_of<Lstm>("lstm"), traits_of<Gru>("gru"),
                                 traits_of<RnnTanh>("rnn_tanh"), traits_of<RnnRelu>("rnn_relu"),
                                 traits_of<LstmPeephole>("lstm_peephole")};

std::string shape_of(const Tensor& t) {
  std::string out = "[";
  for (int64_t d = 0; d < t.dim(); ++d) out += (d ? ", " : "") + std::to_string(t.size(d));
  return out + "]";
}

bool has_shape(const Tensor& t, Sizes shape) {
  if (t.dim() != static_cast<int64_t>(shape.size())) return false;
  int64_t d = 0;
  for (int64_t size : shape)
    if (t.size(d++) != size) return false;
  return true;
}

// x is known to be where the kernels are.
bool beside_x(const Call& call, const Tensor& t) {
  return kLibrary.on_cuda ? t.is_cuda() && t.get_device_index() == call.x.get_device_index() : t.is_cpu();
}

void check_tensor(const Call& call, const char* name, const Tensor& t, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(has_shape(t, Sizes(shape.begin(), shape.size())), name, " has shape ", shape_of(t),
                  ", which does not fit x ", shape_of(call.x), ", hidden size ", call.H, " and batch size ",
                  call.B);
  STD_TORCH_CHECK(t.scalar_type() == call.dtype, name, " and x have different dtypes");
  STD_TORCH_CHECK(beside_x(call, t), name, " and x are on different devices");
}

std::vector<int64_t> shape_as_x(const Call& call, std::initializer_list<int64_t> tail) {
  std::vector<int64_t> shape = call.packed ? std::vector{call.x.size(0)} : std::vector{call.T, call.B};
  shape.insert(shape.end(), tail);
  return shape;
}

// AOTInductor cannot pass an empty list to an op: vectors of no elements stand for absent weights.
void drop_if_absent(Tensors& weights) {
  const auto absent = [](const Tensor& t) { return t.dim() == 1 && t.size(0) == 0; };
  if (std::all_of(weights.begin(), weights.end(), absent)) weights.clear();
}

std::vector<int64_t> offsets_from(const Tensor& batch_sizes, int64_t B, int64_t rows) {
  STD_TORCH_CHECK(batch_sizes.is_cpu(), "batch_sizes must be on the CPU");
  STD_TORCH_CHECK(batch_sizes.scalar_type() == ScalarType::Long, "batch_sizes must be int64");
  STD_TORCH_CHECK(batch_sizes.dim() == 1 && batch_sizes.size(0) > 0,
                  "Expected sequence length to be larger than 0 in RNN");
  const auto* sizes = const_data<int64_t>(batch_sizes);
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

}  // namespace

Tensor Call::shaped_as_x(const Tensor& t, std::initializer_list<int64_t> tail) const {
  return view(t, shape_as_x(*this, tail));
}

Tensor Call::empty_as_x(std::initializer_list<int64_t> tail, ScalarType of) const {
  return fusedrnn::empty(x, shape_as_x(*this, tail), of);
}

Call check(int64_t cell, Tensor x, Tensors state, Tensors weight_ih, Tensors weight_hh, Tensors bias_ih,
           Tensors bias_hh, Tensors weight_hr, std::vector<bool> reverse,
           const std::optional<Tensor>& batch_sizes, bool tf32) {
  for (Tensors* weights : {&bias_ih, &bias_hh, &weight_hr}) drop_if_absent(*weights);
  STD_TORCH_CHECK(cell >= 0 && cell < static_cast<int64_t>(std::size(kCells)), "no cell has number ", cell);
  Call call{.id = static_cast<CellId>(cell),
            .cell = kCells[cell],
            .x = x,
            .state = std::move(state),
            .weight_ih = std::move(weight_ih),
            .weight_hh = std::move(weight_hh),
            .bias_ih = std::move(bias_ih),
            .bias_hh = std::move(bias_hh),
            .weight_hr = std::move(weight_hr),
            .reverse = std::move(reverse),
            .packed = batch_sizes.has_value(),
            .tf32 = tf32,
            .dtype = x.scalar_type(),
            .compute = x.scalar_type()};
  const auto N = static_cast<int64_t>(call.reverse.size());
  const auto fits = [&](const Tensors& list, bool optional) {
    return static_cast<int64_t>(list.size()) == N || (optional && list.empty());
  };
  STD_TORCH_CHECK(N > 0 && fits(call.weight_ih, false) && fits(call.weight_hh, false) &&
                      fits(call.bias_ih, true) && call.bias_ih.size() == call.bias_hh.size() &&
                      fits(call.weight_hr, true),
                  "weights must have one tensor per recurrence");
  STD_TORCH_CHECK(static_cast<int>(call.state.size()) == call.cell.states, call.cell.name, " has ",
                  call.cell.states, " states, got ", call.state.size());
  STD_TORCH_CHECK(call.weight_hr.empty() || !call.cell.reads_h, call.cell.name, " has no projection");
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
  STD_TORCH_CHECK(kLibrary.on_cuda ? x.is_cuda() : x.is_cpu(), "x must be on ",
                  kLibrary.on_cuda ? "a CUDA device" : "the CPU");
  STD_TORCH_CHECK(x.dim() == (call.packed ? 2 : 3), "x must be ", call.packed ? "2-D" : "3-D", ", got ",
                  x.dim(), "-D");
  STD_TORCH_CHECK(call.weight_hh[0].dim() == 2 && call.weight_hh[0].size(0) > 0 &&
                      call.weight_hh[0].size(0) % call.cell.gates == 0,
                  "weight_hh has shape ", shape_of(call.weight_hh[0]), ", expected [", call.cell.gates,
                  "*H, H]");
  STD_TORCH_CHECK(call.weight_hr.empty() || call.weight_hr[0].dim() == 2, "weight_hr must be 2-D");
  STD_TORCH_CHECK(call.state[0].dim() == 3, "state must be 3-D, got ", call.state[0].dim(), "-D");
  call.N = N;
  if (call.weight_ih[0].dim() == 2) {
    const int64_t own = std::max<int64_t>(call.weight_ih[0].size(1), 1);
    if (x.size(-1) > own && x.size(-1) % own == 0 && N % (x.size(-1) / own) == 0) call.K = x.size(-1) / own;
  }
  call.I = x.size(-1) / call.K;
  call.H = call.weight_hh[0].size(0) / call.cell.gates;
  call.P = call.weight_hr.empty() ? call.H : call.weight_hr[0].size(0);
  call.B = call.state[0].size(1);
  if (call.packed) call.offsets = offsets_from(*batch_sizes, call.B, x.size(0));
  call.T = call.packed ? static_cast<int64_t>(call.offsets.size()) - 1 : x.size(0);
  STD_TORCH_CHECK(call.P > 0, "hidden and projection size must be positive");
  STD_TORCH_CHECK(call.T > 0, "Expected sequence length to be larger than 0 in RNN");
  STD_TORCH_CHECK(call.packed || x.size(1) == call.B, "state has batch size ", call.B, ", x has ", x.size(1));
  const int64_t GH = call.cell.gates * call.H;
  for (const Tensor& t : call.weight_ih) check_tensor(call, "weight_ih", t, {GH, call.I});
  for (const Tensor& t : call.weight_hh) check_tensor(call, "weight_hh", t, {GH, call.P});
  for (const Tensor& t : call.bias_ih) check_tensor(call, "bias_ih", t, {GH});
  for (const Tensor& t : call.bias_hh) check_tensor(call, "bias_hh", t, {GH});
  for (const Tensor& t : call.weight_hr) check_tensor(call, "weight_hr", t, {call.P, call.H});
  for (size_t s = 0; s < call.state.size(); ++s)
    check_tensor(call, s ? "state c" : "state h", call.state[s], {N, call.B, s ? call.H : call.P});
  return call;
}

Call with_params(Call call, const Tensors& param) {
  call.param = param;
  const size_t wanted = call.cell.params ? call.N : 0;
  STD_TORCH_CHECK(wanted == 0 || kLibrary.on_cpu_schedule, call.cell.name, " has no kernel here");
  STD_TORCH_CHECK(param.size() == wanted, call.cell.name, " needs ", wanted, " parameters, got ",
                  param.size());
  for (const Tensor& t : param) check_tensor(call, "param", t, {call.cell.params, call.H});
  return call;
}

void check(const Call& call, const Incoming& incoming) {
  const auto fits = [&](const Tensor& t, ScalarType dtype, std::initializer_list<int64_t> tail) {
    return beside_x(call, t) && t.scalar_type() == dtype && has_shape(t, shape_as_x(call, tail));
  };
  const auto& [y, saved, dy, dfinal, need_dx, need_dweights, dkept] = incoming;
  const size_t kept = call.cell.states - (call.projected() ? 0 : 1);
  const bool gates = kLibrary.keeps_gates && call.cell.saved > 0;
  STD_TORCH_CHECK(fits(y, call.dtype, {call.N * call.P}), "y does not fit x");
  STD_TORCH_CHECK(!dy || fits(*dy, call.dtype, {call.N * call.P}), "dy does not fit x");
  STD_TORCH_CHECK(saved.size() == kept + gates, "saved must be what sequence_forward returned");
  for (size_t i = 0; i < saved.size(); ++i)
    STD_TORCH_CHECK(i < kept ? fits(saved[i], call.compute, {call.N, call.H})
                             : fits(saved[i], call.compute, {call.N, call.slots(), call.H}),
                    "saved must be what sequence_forward returned");
  STD_TORCH_CHECK(dfinal.size() == call.state.size(), "one gradient per state is needed");
  for (size_t s = 0; s < dfinal.size(); ++s)
    check_tensor(call, "dfinal", dfinal[s], {call.N, call.B, s ? call.H : call.P});
  STD_TORCH_CHECK(dkept.empty() || kLibrary.on_cpu_schedule,
                  "this backward takes no gradients of the states of all steps");
  STD_TORCH_CHECK(dkept.empty() || static_cast<int>(dkept.size()) == call.cell.states - 1,
                  "one gradient per state but h is needed for the states of all steps");
  for (const Tensor& t : dkept)
    STD_TORCH_CHECK(fits(t, call.compute, {call.N, call.H}), "dkept does not fit what was saved");
}

Tensor rows_of(const Call& call) { return view(dense(call.x), {call.rows(), call.K * call.I}); }

Tensor input_of(const Call& call, const Tensor& rows, int64_t n) {
  return call.K == 1 ? rows : narrow(rows, 1, call.first_feature(n), call.I);
}

Tensor columns_of(const Tensor& buffer, int64_t n, int64_t gates) {
  const int64_t slots = buffer.size(2), H = buffer.size(3);
  return strided(buffer, std::array<int64_t, 2>{buffer.size(0), gates * H},
                 std::array<int64_t, 2>{buffer.stride(0), 1}, n * slots * H);
}

}  // namespace fusedrnn
