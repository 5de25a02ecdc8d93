#pragma once

#include "cell.h"

namespace fusedrnn {

// torch.nn.RNN, one struct a nonlinearity. The next state is all that backward needs.
struct RnnTanh {
  static constexpr int kGates = 1, kStates = 1, kSaved = 0;
  static constexpr bool kSameGates = true, kReadsH = false;

  template <class V>
  FUSEDRNN_HD static Forward<RnnTanh, V> forward(const Array<V, 1>& gx, const Array<V, 1>& gh,
                                                 const Array<V, 1>&) {
    return {{{tanh(gx[0] + gh[0])}}, {}};
  }

  template <class V>
  FUSEDRNN_HD static Backward<RnnTanh, V> backward(const Array<V, 1>& dnext, const Array<V, 0>&,
                                                   const Array<V, 1>&, const Array<V, 1>& next) {
    const Array<V, 1> d{{dnext[0] * (V(1) - next[0] * next[0])}};
    return {d, d, {{V(0)}}};
  }
};

struct RnnRelu {
  static constexpr int kGates = 1, kStates = 1, kSaved = 0;
  static constexpr bool kSameGates = true, kReadsH = false;

  template <class V>
  FUSEDRNN_HD static Forward<RnnRelu, V> forward(const Array<V, 1>& gx, const Array<V, 1>& gh,
                                                 const Array<V, 1>&) {
    const V a = gx[0] + gh[0];
    return {{{where_less(a, V(0), V(0), a)}}, {}};  // NaN stays NaN
  }

  template <class V>
  FUSEDRNN_HD static Backward<RnnRelu, V> backward(const Array<V, 1>& dnext, const Array<V, 0>&,
                                                   const Array<V, 1>&, const Array<V, 1>& next) {
    const Array<V, 1> d{{where_less(V(0), next[0], dnext[0], V(0))}};
    return {d, d, {{V(0)}}};
  }
};

}  // namespace fusedrnn
