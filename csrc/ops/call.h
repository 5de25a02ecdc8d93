// A layer call as the ops got it, checked. The kernels work on raw pointers, so every size, dtype and device
// is compared here before anything runs.
#pragma once

#include <algorithm>
#include <string>

#include "../sequence.h"
#include "aten.h"

namespace fusedrnn {

// What the ops need to know of a cell, from its C++ struct.
struct CellTraits {
  const char* name;
  int gates, states, saved, params;
  bool same_gates, reads_h;
};

struct Call {
  CellId id;
  CellTraits cell;
  Tensor x;  // [T, B, K*I], packed: [rows, K*I]
  Tensors state, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr;
  Tensors param = {};  // [K, H] for each recurrence, of a cell that has parameters
  std::vector<bool> reverse;
  bool packed;
  bool tf32;  // products of float32 may take tf32 operands
  int64_t T = 0, B = 0, I = 0, H = 0, P = 0, N = 0;
  int64_t K = 1;                      // inputs side by side in x, each for N / K recurrences in turn
  std::vector<int64_t> offsets = {};  // [T+1] if packed
  ScalarType dtype, compute;          // of the tensors; of what is carried and accumulated

  Steps steps() const { return {T, B, packed ? offsets.data() : nullptr}; }
  int64_t rows() const { return steps().rows(); }
  bool projected() const { return !weight_hr.empty(); }
  int64_t first_feature(int64_t n) const { return n * K / N * I; }  // of recurrence n's input in x
  // Values per unit and row that a kernel keeps in the place of its gates.
  int64_t slots() const { return std::max(cell.gates, cell.saved); }
  // [rows, ...] as [T, B, ...] or [rows, ...]: the shape of outputs.
  Tensor shaped_as_x(const Tensor& t, std::initializer_list<int64_t> tail) const;

  // [T, B, ...] or [rows, ...], to be filled.
  Tensor empty_as_x(std::initializer_list<int64_t> tail, ScalarType of) const;

  Tensor empty(std::initializer_list<int64_t> sizes, ScalarType of) const {
    return fusedrnn::empty(x, sizes, of);
  }
  Tensor zeros(std::initializer_list<int64_t> sizes, ScalarType of) const {
    return fusedrnn::zeros(x, sizes, of);
  }
};

// What a backward gets besides the call.
struct Incoming {
  Tensor y;
  Tensors saved;
  std::optional<Tensor> dy;
  Tensors dfinal;
  bool need_dx, need_dweights;
  Tensors dkept =
      {};  // of the states of all steps but h, as `saved` has them; none if they have no gradients
};

// Each throws if something does not fit.
Call check(int64_t cell, Tensor x, Tensors state, Tensors weight_ih, Tensors weight_hh, Tensors bias_ih,
           Tensors bias_hh, Tensors weight_hr, std::vector<bool> reverse,
           const std::optional<Tensor>& batch_sizes, bool tf32);
Call with_params(Call call, const Tensors& param);
void check(const Call& call, const Incoming& incoming);

// x as a matrix of rows; copies only if its strides ask for it.
Tensor rows_of(const Call& call);

// Of the rows of x, those features that are the input of recurrence n.
Tensor input_of(const Call& call, const Tensor& rows, int64_t n);

// Columns [rows, width] of recurrence n of a buffer [rows, N, slots, H].
Tensor columns_of(const Tensor& buffer, int64_t n, int64_t gates);

}  // namespace fusedrnn
