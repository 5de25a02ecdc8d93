// Matrix products over all steps of a sequence, and what they make of a backward pass over its steps.
//
// Operands are in the dtype of the caller's tensors on a GPU, which multiplies 16-bit numbers and adds fp32,
// and in the compute dtype on a CPU.
#pragma once

#include "ops.h"

namespace fusedrnn {

// t as an operand of multiply().
Tensor operand(const Call& call, const Tensor& t);

// out = a b. Sums of 16-bit products are rounded once, to out's dtype. `out` may be a view of columns.
void multiply(const Tensor& out, const Tensor& a, const Tensor& b);

// W_ih x of all rows, into the first G slots of [rows, N, slots, H].
void multiply_input(const Call& call, const Tensor& gates);

// What a backward pass over the steps leaves.
struct Sweep {
  Tensor dgx, dgh;    // [rows, N, G, H]; one tensor for cells whose gates share a gradient
  Tensor h_previous;  // [rows, N, P]: the h each row's step started from, if weight gradients are needed
  Tensor dprojected;  // [rows, N, P]: gradient of the projected h of each step, if there is a projection
  Tensors dstate = {};
  Tensors dbias_ih = {}, dbias_hh = {};  // [G*H] of each recurrence, or empty: still to be summed up
};

Gradients gradients_of(const Call& call, const Incoming& incoming, Sweep sweep);

}  // namespace fusedrnn
