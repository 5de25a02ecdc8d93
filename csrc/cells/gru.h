#pragma once

#include "cell.h"

namespace fusedrnn {

// torch.nn.GRU: gates r z n, with r applied to the recurrent contribution of n, bias included.
struct Gru {
  static constexpr int kGates = 3, kStates = 1, kSaved = 4;
  static constexpr bool kSameGates = false, kReadsH = true;

  template <class V>
  FUSEDRNN_HD static Forward<Gru, V> forward(const Array<V, 3>& gx, const Array<V, 3>& gh,
                                             const Array<V, 1>& state) {
    const V r = sigmoid(gx[0] + gh[0]), z = sigmoid(gx[1] + gh[1]);
    const V n = tanh(gx[2] + r * gh[2]);
    return {{{n + z * (state[0] - n)}}, {{r, z, n, gh[2]}}};
  }

  template <class V>
  FUSEDRNN_HD static Backward<Gru, V> backward(const Array<V, 1>& dnext, const Array<V, 4>& saved,
                                               const Array<V, 1>& state, const Array<V, 1>&) {
    const V r = saved[0], z = saved[1], n = saved[2], one(1);
    const V dn = dnext[0] * (one - z) * (one - n * n);
    const V dz = dnext[0] * (state[0] - n) * z * (one - z);
    const V dr = dn * saved[3] * r * (one - r);
    return {{{dr, dz, dn}}, {{dr, dz, dn * r}}, {{dnext[0] * z}}};
  }
};

}  // namespace fusedrnn
