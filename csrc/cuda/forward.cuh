// The forward pass of a cell, for the persistent kernel: the operand is h, the product W_hh h of all gates.
#pragma once

#include "kernels.h"
#include "persistent.cuh"

namespace fusedrnn::cuda {

template <class E>
struct ForwardPassParams : PersistentParams {
  Weights weights[kMaxRecurrences];  // those of recurrences 0..N-1
  const float* gx;                   // [rows, all N, G, H]
  const E* state0[kMaxStates];       // [all N, B, H]
  E* y;                              // [rows, all N, H]
  E* final_state[kMaxStates];        // [all N, B, H]
  float* kept[kMaxStates];           // [rows, all N, H] or null
};

template <class Cell, class Op>
class ForwardPass {
 public:
  using Operand = Op;
  using E = typename Op::Element;
  using V = typename Op::Value;
  using Params = ForwardPassParams<E>;
  static constexpr int kGates = Cell::kGates, kStates = Cell::kStates;
  static constexpr int kTiles = kGates, kPublished = 1;

  static constexpr PersistentPass kPass{kTiles, kPublished, kGates, kRegisterSteps<Op, kTiles>, sizeof(E)};

  FUSEDRNN_DEVICE ForwardPass(const Params& p, const Place& at, int64_t group, float* prefetched)
      : p_(p),
        at_(at),
        prefetched_(prefetched),
        n_(p.first + static_cast<int>(group % p.N)),
        b0_(static_cast<int>(group / p.N) * at.rows + at.row0),
        unit_(at.slice * at.units + at.unit),
        order_{p.steps, steps_of_sequence(p.steps, b0_ - at.row0), p.weights[group % p.N].reverse} {
    const Weights& w = p.weights[n_ - p.first];
    const auto bias = [&](const void* from, int gate) {
      return from && unit_ < p.H ? widen(static_cast<const E*>(from)[gate * p.H + unit_]) : 0.0f;
    };
#pragma unroll
    for (int gate = 0; gate < kGates; ++gate) {
      bias_x_[gate] = bias(w.bias_ih, gate);
      bias_h_[gate] = bias(w.bias_hh, gate);
      if constexpr (Cell::kSameGates) bias_x_[gate] += bias_h_[gate];
    }
#pragma unroll
    for (int i = 0; i < kMaxElements; ++i)
#pragma unroll
      for (int s = 0; s < kStates; ++s) state_[i][s] = exists(i) ? widen(p.state0[s][initial(i)]) : 0.0f;
    here_ = order_.at(0);
  }

  FUSEDRNN_DEVICE int steps() const { return order_.T; }

  // Of 16 units from `units` of the block on: tile is the gate, k0 + k the unit of the previous h.
  FUSEDRNN_DEVICE static auto weights(const Params& p, const Place& at, int64_t group, int units) {
    const auto* weight = static_cast<const E*>(p.weights[group % p.N].hh);
    return [weight, first = at.slice * at.units + units, H = p.H](int gate, int k0) {
      const E* from = weight + (int64_t{gate} * H + first) * H + k0;
      return [from, rows = H - first, columns = H - k0, H](int row, int k) {
        return load_if(row < rows && k < columns, from + row * H + k);
      };
    };
  }

  template <class Exchange>
  FUSEDRNN_DEVICE void begin(Exchange& exchange) {
#pragma unroll
    for (int i = 0; i < kMaxElements; ++i)
      if (at_.has(i)) exchange.stage(0, i, 0, Op::operand(state_[i][0]));
  }

  FUSEDRNN_DEVICE void prefetch(int s) {
#pragma unroll
    for (int i = 0; i < kMaxElements; ++i)
      if (alive(i, here_)) {
        const float* gx = p_.gx + (row(i, here_) * p_.all + n_) * kGates * p_.H + unit_;
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate) copy_async(prefetched(i, gate), gx + gate * p_.H);
      }
    store();
    next_ = order_.at(s + 1);
  }

  template <class Exchange>
  FUSEDRNN_DEVICE void step(int s, const Partial& partial, Exchange& exchange) {
    for_elements(at_, [&]<int kFirst, int kCount>(Constant<kFirst>, Constant<kCount>) {
      if (sequence(kFirst) < here_.count) {
        float sums[kCount][kGates];
        partial.sums(at_.row(kFirst), at_.has(kFirst + kCount - 1) ? at_.row_stride : 0, at_.unit, sums);
#pragma unroll
        for (int i = kFirst; i < kFirst + kCount; ++i) {
          Array<V, kGates> gx, gh;
          Array<V, kStates> state;
#pragma unroll
          for (int gate = 0; gate < kGates; ++gate) {
            const float sum = sums[i - kFirst][gate];
            gx[gate] = V(*prefetched(i, gate) + bias_x_[gate]);
            gh[gate] = V(Cell::kSameGates ? sum : sum + bias_h_[gate]);
          }
#pragma unroll
          for (int j = 0; j < kStates; ++j) state[j] = V(state_[i][j]);
          const auto next = Cell::forward(gx, gh, state);
          const bool taken = alive(i, here_);
          const float h = opaque(widen(narrow<E>(value_of(next.state[0]))));
          state_[i][0] = taken ? h : state_[i][0];
#pragma unroll
          for (int j = 1; j < kStates; ++j) state_[i][j] = taken ? value_of(next.state[j]) : state_[i][j];
        }
      }
      if (s + 1 == order_.T) return;
#pragma unroll
      for (int i = kFirst; i < kFirst + kCount; ++i)
        if (at_.has(i)) exchange.stage(static_cast<uint32_t>(s + 1), i, 0, Op::operand(state_[i][0]));
    });
    // Nothing that follows from these is kept from step to step: the registers hold weights.
    b0_ = opaque(b0_);
    n_ = opaque(n_);
    unit_ = opaque(unit_);
    before_ = here_;
    here_ = next_;
  }

  FUSEDRNN_DEVICE void end() {
    store();
#pragma unroll
    for (int i = 0; i < kMaxElements; ++i)
#pragma unroll
      for (int j = 0; j < kStates; ++j)
        if (exists(i)) p_.final_state[j][initial(i)] = narrow<E>(state_[i][j]);
  }

 private:
  // What the last step gave. Called once h is published: no peer waits for these stores.
  FUSEDRNN_DEVICE void store() {
#pragma unroll
    for (int i = 0; i < kMaxElements; ++i)
      if (alive(i, before_)) {
        const int64_t at = (row(i, before_) * p_.all + n_) * p_.H + unit_;
        p_.y[at] = narrow<E>(state_[i][0]);
#pragma unroll
        for (int j = 1; j < kStates; ++j)
          if (p_.kept[j]) p_.kept[j][at] = state_[i][j];
      }
  }

  FUSEDRNN_DEVICE int sequence(int i) const { return b0_ + i * at_.row_stride; }
  FUSEDRNN_DEVICE bool exists(int i) const { return at_.has(i) && unit_ < p_.H && sequence(i) < p_.B; }
  FUSEDRNN_DEVICE bool alive(int i, const Cursor& step) const {
    return at_.has(i) && unit_ < p_.H && sequence(i) < step.count;
  }
  FUSEDRNN_DEVICE int64_t row(int i, const Cursor& step) const { return step.offset + sequence(i); }
  FUSEDRNN_DEVICE int64_t initial(int i) const { return (int64_t{n_} * p_.B + sequence(i)) * p_.H + unit_; }
  FUSEDRNN_DEVICE float* prefetched(int i, int j) const { return prefetched_ + i * kGates + j; }

  const Params& p_;
  const Place& at_;
  float* prefetched_;
  int n_, b0_, unit_;
  Order order_;
  Cursor before_{0, 0}, here_, next_;  // of the last step, of the one to come and of the one after it
  float bias_x_[kGates], bias_h_[kGates];
  float state_[kMaxElements][kStates];
};

}  // namespace fusedrnn::cuda
