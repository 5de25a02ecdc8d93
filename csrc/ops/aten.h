// torch's stable tensor as the ops use it, and calls into torch that the stable headers have no function for.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <vector>

namespace fusedrnn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

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

template <class... Args>
Tensor call_torch(const char* name, const char* overload, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor mm_out(const Tensor& out, const Tensor& a, const Tensor& b) {
  return call_torch("aten::mm", "out", a, b, out);
}

inline Tensor cat(const Tensors& tensors, int64_t dim) {
  return tensors.size() == 1 ? tensors[0] : call_torch("aten::cat", "", tensors, dim);
}

// Elements of t by other sizes and strides, from an offset in elements; as all views, not through the
// dispatcher, which small calls would notice.
inline Tensor strided(const Tensor& t, Sizes sizes, Sizes strides, int64_t offset = 0) {
  AtenTensorHandle out;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), static_cast<int64_t>(sizes.size()),
                                                        sizes.data(), strides.data(), offset, &out));
  return Tensor(out);
}

inline std::vector<int64_t> contiguous_strides(Sizes sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(1, sizes[d]);
  return strides;
}

inline Tensor narrow(const Tensor& t, int64_t dim, int64_t start, int64_t length) {
  std::vector<int64_t> sizes(t.sizes().begin(), t.sizes().end());
  sizes[dim] = length;
  return strided(t, sizes, t.strides(), start * t.stride(dim));
}

// t must be contiguous.
inline Tensor view(const Tensor& t, const std::vector<int64_t>& sizes) {
  return strided(t, sizes, contiguous_strides(sizes));
}
inline Tensor view(const Tensor& t, std::initializer_list<int64_t> sizes) {
  return view(t, std::vector<int64_t>(sizes));
}

// Entry i of the first dimension.
inline Tensor select(const Tensor& t, int64_t i) {
  const auto sizes = t.sizes(), strides = t.strides();
  return strided(t, Sizes(sizes.data() + 1, sizes.size() - 1), Sizes(strides.data() + 1, sizes.size() - 1),
                 i * strides[0]);
}

inline Tensor transposed(const Tensor& t) {
  return strided(t, std::array<int64_t, 2>{t.size(1), t.size(0)},
                 std::array<int64_t, 2>{t.stride(1), t.stride(0)});
}

inline Tensor to_dtype(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

inline Tensor add(const Tensor& a, const Tensor& b) { return torch::stable::subtract(a, b, -1); }

inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// On t's device, as all that follow. Not through the dispatcher either.
inline Tensor empty(const Tensor& t, Sizes sizes, ScalarType dtype) {
  const std::vector<int64_t> strides = contiguous_strides(sizes);
  int32_t device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device));
  AtenTensorHandle out;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device,
                               t.get_device_index(), &out));
  return Tensor(out);
}

inline Tensor empty(const Tensor& t, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return empty(t, Sizes(sizes.begin(), sizes.size()), dtype);
}

inline Tensor zeros(const Tensor& t, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  Tensor out = empty(t, sizes, dtype);
  return torch::stable::zero_(out);
}

// A contiguous copy that shares nothing with t.
inline Tensor copy_as(const Tensor& t, ScalarType dtype) {
  Tensor out = torch::stable::new_empty(t, t.sizes(), dtype);
  return torch::stable::copy_(out, t);
}

inline Tensor zeros_like(const Tensor& t, ScalarType dtype) {
  Tensor out = torch::stable::new_empty(t, t.sizes(), dtype);
  return torch::stable::zero_(out);
}

inline Tensor column_sums(const Tensor& t, ScalarType dtype) {
  const std::array<int64_t, 1> rows{0};
  return torch::stable::sum(t, std::optional<Sizes>(rows), false, dtype);
}

template <class T = void>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <class T = void>
const T* const_data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

}  // namespace fusedrnn
