// The backward pass of a cell, for the persistent kernel: the operand is dgh, the product W_hh^T dgh.
//
// Steps are visited in the reverse of the forward's order. The gates of a step are computed again from its gx
// and gh, which two products of the whole sequence gave.
#pragma once

#include "kernels.h"
#include "persistent.cuh"

namespace fusedrnn::cuda {

template <class E>
struct BackwardPassParams : PersistentParams {
  Weights weights[kMaxRecurrences];  // those of recurrences 0..N-1
  const float* gx;                   // [rows, all N, G, H], as Backward has them
  const float* gh;                   // [rows, all N, G, H]
  const E* h_previous;               // [rows, all N, H]
  const E* y;                        // [rows, all N, H]
  const float* kept[kMaxStates];     // [rows, all N, H]
  const E* state0[kMaxStates];       // [all N, B, H]
  const E* dy;                       // [rows, all N, H] or null
  const E* dfinal[kMaxStates];       // [all N, B, H]
  E* dstate0[kMaxStates];            // [all N, B, H]
  E* dgx;                            // [rows, all N, G, H]
  E* dgh;                            // [rows, all N, G, H] or null
};

template <class Cell, class Op>
class BackwardPass {
 public:
  using Operand = Op;
  using E = typename Op::Element;
  using V = typename Op::Value;
  using Params = BackwardPassParams<E>;
  static constexpr int kGates = Cell::kGates, kStates = Cell::kStates;
  static constexpr int kTiles = 1, kPublished = kGates;
  // Copied ahead: what the gates are recomputed from, and each further state before and after the step.
  static constexpr int kRecomputed = Cell::kSaved == 0 ? 0 : Cell::kSameGates ? kGates : 2 * kGates;
  static constexpr int kPrefetched = kRecomputed + 2 * (kStates - 1);

  static constexpr PersistentPass kPass{kTiles, kPublished, kPrefetched, kRegisterSteps<Op, kTiles>,
                                        sizeof(E)};

  FUSEDRNN_DEVICE BackwardPass(const Params& p, const Place& at, int64_t group, float* prefetched)
      : p_(p),
        at_(at),
        prefetched_(prefetched),
        n_(p.first + static_cast<int>(group % p.N)),
        b0_(static_cast<int>(group / p.N) * at.rows + at.row0),
        unit_(at.slice * at.units + at.unit),
        order_{p.steps, steps_of_sequence(p.steps, b0_ - at.row0), !p.weights[group % p.N].reverse} {
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
    for (int i = 0; i < kMaxElements; ++i) {
#pragma unroll
      for (int j = 0; j < kStates; ++j) dstate_[i][j] = exists(i) ? widen(p.dfinal[j][initial(i)]) : 0.0f;
      dy_[i] = h_[i] = h_previous_[i] = narrow<E>(0.0f);
    }
    here_ = order_.at(0);
    next_ = order_.at(1);
  }

  FUSEDRNN_DEVICE int steps() const { return order_.T; }

  // Of 16 units of the previous h from `units` of the block on: k0 + k counts (slice, gate, unit). A step of
  // K lies in one gate of one slice.
  FUSEDRNN_DEVICE static auto weights(const Params& p, const Place& at, int64_t group, int units) {
    const auto* weight = static_cast<const E*>(p.weights[group % p.N].hh);
    return [weight, first = at.slice * at.units + units, H = p.H, U = at.units](int, int k0) {
      const int block = k0 / U, gate = block % kGates, unit = block / kGates * U + (k0 - block * U);
      const E* from = weight + (int64_t{gate} * H + unit) * H + first;
      return [from, rows = H - first, columns = H - unit, H](int row, int k) {
        return load_if(row < rows && k < columns, from + k * H + row);
      };
    };
  }

  template <class Exchange>
  FUSEDRNN_DEVICE void begin(Exchange& exchange) {
    prefetch_step(0);
    copy_async_wait();
    gates(0, exchange);
  }

  FUSEDRNN_DEVICE void prefetch(int s) {
    prefetch_step(s + 1);
    store();
  }

  template <class Exchange>
  FUSEDRNN_DEVICE void step(int s, const Partial& partial, Exchange& exchange) {
    for_elements(at_, [&]<int kFirst, int kCount>(Constant<kFirst>, Constant<kCount>) {
      float sums[kCount][1];
      partial.sums(at_.row(kFirst), at_.has(kFirst + kCount - 1) ? at_.row_stride : 0, at_.unit, sums);
#pragma unroll
      for (int i = kFirst; i < kFirst + kCount; ++i) dstate_[i][0] += sums[i - kFirst][0];
    });
    if (s + 1 < order_.T) gates(s + 1, exchange);
  }

  FUSEDRNN_DEVICE void end() {
#pragma unroll
    for (int i = 0; i < kMaxElements; ++i)
#pragma unroll
      for (int j = 0; j < kStates; ++j)
        if (exists(i)) p_.dstate0[j][initial(i)] = narrow<E>(dstate_[i][j]);
  }

 private:
  FUSEDRNN_DEVICE void prefetch_step(int s) {
#pragma unroll
    for (int i = 0; i < kMaxElements; ++i) {
      if (!alive(i, here_)) continue;
      const int64_t at = (here_.offset + sequence(i)) * p_.all + n_;
      const int64_t from = at * kGates * p_.H + unit_;
      if constexpr (kRecomputed > 0)
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate) {
          copy_async(prefetched(i, gate), p_.gx + from + gate * p_.H);
          if constexpr (!Cell::kSameGates)
            copy_async(prefetched(i, kGates + gate), p_.gh + from + gate * p_.H);
        }
#pragma unroll
      for (int j = 1; j < kStates; ++j) {
        copy_async(prefetched(i, kRecomputed + 2 * j - 2), p_.kept[j] + at * p_.H + unit_);
        float* before = prefetched(i, kRecomputed + 2 * j - 1);
        if (sequence(i) < next_.count)  // a step before this one
          copy_async(before, p_.kept[j] + previous(i));
        else
          *before = widen(p_.state0[j][initial(i)]);
      }
      // As they are: to widen one here would be to wait for it.
      dy_[i] = p_.dy ? p_.dy[at * p_.H + unit_] : narrow<E>(0.0f);
      h_[i] = p_.y[at * p_.H + unit_];
      h_previous_[i] = p_.h_previous[at * p_.H + unit_];
    }
    after_ = order_.at(s + 2);
  }

  // Gradients of the gates of the last step. Called once its operand is published: no peer waits for these.
  FUSEDRNN_DEVICE void store() {
#pragma unroll
    for (int i = 0; i < kMaxElements; ++i) {
      if (!alive(i, before_)) continue;
      const int64_t to = ((before_.offset + sequence(i)) * p_.all + n_) * kGates * p_.H + unit_;
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) {
        p_.dgx[to + gate * p_.H] = dgx_[i][gate];
        if constexpr (!Cell::kSameGates) p_.dgh[to + gate * p_.H] = dgh_[i][gate];
      }
    }
  }

  // The pointwise part of step s. Where a sequence does not take part, its gradients wait and its dgh are 0.
  template <class Exchange>
  FUSEDRNN_DEVICE void gates(int s, Exchange& exchange) {
    for_elements(at_, [&]<int kFirst, int kCount>(Constant<kFirst>, Constant<kCount>) {
      float dgh[kCount][kGates] = {};
      if (sequence(kFirst) < here_.count)
#pragma unroll
        for (int i = kFirst; i < kFirst + kCount; ++i) {
          Array<V, kStates> state, next, dnext;
          state[0] = V(widen(h_previous_[i]));
          next[0] = V(widen(h_[i]));
          dnext[0] = V(dstate_[i][0] + widen(dy_[i]));
#pragma unroll
          for (int j = 1; j < kStates; ++j) {
            state[j] = V(*prefetched(i, kRecomputed + 2 * j - 1));
            next[j] = V(*prefetched(i, kRecomputed + 2 * j - 2));
            dnext[j] = V(dstate_[i][j]);
          }
          const auto d = Cell::backward(dnext, saved(i, state), state, next);
          const bool taken = alive(i, here_);
#pragma unroll
          for (int gate = 0; gate < kGates; ++gate) {
            dgh[i - kFirst][gate] = taken ? value_of(d.dgh[gate]) : 0.0f;
            dgx_[i][gate] = narrow<E>(value_of(d.dgx[gate]));
            if constexpr (!Cell::kSameGates) dgh_[i][gate] = narrow<E>(value_of(d.dgh[gate]));
          }
#pragma unroll
          for (int j = 0; j < kStates; ++j) dstate_[i][j] = taken ? value_of(d.dstate[j]) : dstate_[i][j];
        }
#pragma unroll
      for (int i = kFirst; i < kFirst + kCount; ++i)
#pragma unroll
        for (int gate = 0; gate < kGates; ++gate)
          if (at_.has(i))
            exchange.stage(static_cast<uint32_t>(s), i, gate, Op::operand(dgh[i - kFirst][gate]));
    });
    // Nothing that follows from these is kept from step to step: the registers hold weights.
    b0_ = opaque(b0_);
    n_ = opaque(n_);
    unit_ = opaque(unit_);
    before_ = here_;
    here_ = next_;
    next_ = after_;
  }

  FUSEDRNN_DEVICE auto saved(int i, const Array<V, kStates>& state) const {
    if constexpr (Cell::kSaved == 0) {
      return Array<V, 0>{};
    } else {
      Array<V, kGates> gx, gh;
#pragma unroll
      for (int gate = 0; gate < kGates; ++gate) {
        gx[gate] = V(*prefetched(i, gate) + bias_x_[gate]);
        gh[gate] = V(Cell::kSameGates ? 0.0f : *prefetched(i, kGates + gate) + bias_h_[gate]);
      }
      return Cell::forward(gx, gh, state).saved;
    }
  }

  FUSEDRNN_DEVICE int sequence(int i) const { return b0_ + i * at_.row_stride; }
  FUSEDRNN_DEVICE bool exists(int i) const { return at_.has(i) && unit_ < p_.H && sequence(i) < p_.B; }
  FUSEDRNN_DEVICE bool alive(int i, const Cursor& step) const {
    return at_.has(i) && unit_ < p_.H && sequence(i) < step.count;
  }
  FUSEDRNN_DEVICE int64_t previous(int i) const {
    return ((next_.offset + sequence(i)) * p_.all + n_) * p_.H + unit_;
  }
  FUSEDRNN_DEVICE int64_t initial(int i) const { return (int64_t{n_} * p_.B + sequence(i)) * p_.H + unit_; }
  FUSEDRNN_DEVICE float* prefetched(int i, int j) const { return prefetched_ + i * kPrefetched + j; }

  const Params& p_;
  const Place& at_;
  float* prefetched_;
  int n_, b0_, unit_;
  Order order_;
  Cursor before_{0, 0}, here_, next_, after_;  // of the last step, of the one to come and of those after it
  float bias_x_[kGates], bias_h_[kGates];
  float dstate_[kMaxElements][kStates];
  E dy_[kMaxElements], h_[kMaxElements], h_previous_[kMaxElements];
  E dgx_[kMaxElements][kGates], dgh_[kMaxElements][Cell::kSameGates ? 1 : kGates];
};

}  // namespace fusedrnn::cuda
