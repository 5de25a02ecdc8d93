#pragma once

#include "cell.h"

namespace fusedrnn {

// torch.nn.LSTM: gates i f g o, states h c.
struct Lstm {
  static constexpr int kGates = 4, kStates = 2, kSaved = 4;
  static constexpr bool kSameGates = true, kReadsH = false;

  template <class V>
  FUSEDRNN_HD static Forward<Lstm, V> forward(const Array<V, 4>& gx, const Array<V, 4>& gh,
                                              const Array<V, 2>& state) {
    const V i = sigmoid(gx[0] + gh[0]), f = sigmoid(gx[1] + gh[1]);
    const V g = tanh(gx[2] + gh[2]), o = sigmoid(gx[3] + gh[3]);
    const V c = f * state[1] + i * g;
    return {{{o * tanh(c), c}}, {{i, f, g, o}}};
  }

  template <class V>
  FUSEDRNN_HD static Backward<Lstm, V> backward(const Array<V, 2>& dnext, const Array<V, 4>& saved,
                                                const Array<V, 2>& state, const Array<V, 2>& next) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3], one(1);
    const V tc = tanh(next[1]);
    const V dc = dnext[1] + dnext[0] * o * (one - tc * tc);
    const Array<V, 4> d{{dc * g * i * (one - i), dc * state[1] * f * (one - f), dc * i * (one - g * g),
                         dnext[0] * tc * o * (one - o)}};
    return {d, d, {{V(0), dc * f}}};
  }
};

// An LSTM whose gates see the cell state (Gers and Schmidhuber, 2000; ONNX's P): i and f that before the
// step, o that after it. Parameters in this order.
struct LstmPeephole {
  static constexpr int kGates = 4, kStates = 2, kSaved = 4, kParams = 3;
  static constexpr bool kSameGates = true, kReadsH = false;

  template <class V>
  FUSEDRNN_HD static Forward<LstmPeephole, V> forward(const Array<V, 4>& gx, const Array<V, 4>& gh,
                                                      const Array<V, 2>& state, const Array<V, 3>& param) {
    const V i = sigmoid(gx[0] + gh[0] + param[0] * state[1]),
            f = sigmoid(gx[1] + gh[1] + param[1] * state[1]);
    const V g = tanh(gx[2] + gh[2]), c = f * state[1] + i * g;
    const V o = sigmoid(gx[3] + gh[3] + param[2] * c);
    return {{{o * tanh(c), c}}, {{i, f, g, o}}};
  }

  template <class V>
  FUSEDRNN_HD static Backward<LstmPeephole, V> backward(const Array<V, 2>& dnext, const Array<V, 4>& saved,
                                                        const Array<V, 2>& state, const Array<V, 2>& next,
                                                        const Array<V, 3>& param) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3], one(1);
    const V tc = tanh(next[1]), do_ = dnext[0] * tc * o * (one - o);
    const V dc = dnext[1] + dnext[0] * o * (one - tc * tc) + do_ * param[2];
    const V di = dc * g * i * (one - i), df = dc * state[1] * f * (one - f);
    const Array<V, 4> d{{di, df, dc * i * (one - g * g), do_}};
    return {d,
            d,
            {{V(0), dc * f + di * param[0] + df * param[1]}},
            {{di * state[1], df * state[1], do_ * next[1]}}};
  }
};

}  // namespace fusedrnn
