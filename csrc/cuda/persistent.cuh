// The persistent schedule: one launch runs a whole sequence with weights and state on chip.
//
// It is written once for both directions. A pass (forward.cuh, backward.cuh) owns the state of the elements
// of its threads and what is pointwise; the kernel owns the weights, the product and time. At every step
//
//   publish the operand -> receive that of the whole group -> weights x operand -> partial sums -> pointwise
//
// Products are of 16 units by 8 sequences: a warp multiplies the kTiles tiles of one 16 units (all gates of
// them in a forward) over its part of K. The weights of its first kRegisterSteps steps of K are in registers,
// the others in shared memory.
//
// A pass: begin stages the first operand; prefetch, once operand s is published, starts the copies that step
// will read and stores what no peer waits for; step turns the sums of product s into state and stages operand
// s + 1, if there is one; end writes what is final.
#pragma once

#include <type_traits>

#include "exchange.h"

namespace fusedrnn::cuda {

// What the kernel itself needs; the parameters of a pass derive from it.
struct PersistentParams {
  PersistentPlan plan;
  Steps steps;
  int T, B, H;
  int N;  // recurrences of this launch, from `first` on; the tensors have `all`
  int first, all;
  int64_t first_group;  // of this launch: group i is recurrence i % N, sequences from i / N * rows on
  int64_t group_bytes;  // of the workspace
  char* workspace;      // each group: its operands, then its flags
  uint32_t* status;
};

template <class Op, int kTiles>
inline constexpr int kRegisterSteps = !Op::kTensorCore ? 0
                                      : kTiles == 1    ? 24
                                                       : 8;

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

inline constexpr int kChunk = 8;  // steps of K whose operand is loaded before any is multiplied

// Products that add to the same sums wait for one another: few tiles are multiplied into more sums than one.
template <int kTiles>
inline constexpr int kChains = kTiles == 1 ? 4 : 1;

// How many steps have a sequence of the batch from b on: counts do not increase.
FUSEDRNN_DEVICE int steps_of_sequence(const Steps& steps, int64_t b) {
  int low = 0, high = static_cast<int>(steps.T);
  if (!steps.offsets) return high;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (steps.count(middle) > b)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// Rows of one step.
struct Cursor {
  int64_t offset;
  int count;
};

// The order in which a group visits its steps.
struct Order {
  const Steps& steps;
  int T;  // steps of the group
  bool descending;

  FUSEDRNN_DEVICE Cursor at(int s) const {
    if (s >= T) return {0, 0};
    const int t = descending ? T - 1 - s : s;
    return {steps.offset(t), static_cast<int>(steps.count(t))};
  }
};

// Partial sums [k_splits][kTiles][rows][U + 4] in shared memory: by the four, tensor cores' meet in no bank.
struct Partial {
  float* values;
  int splits, tiles, rows, units;

  FUSEDRNN_DEVICE float& at(int split, int tile, int row, int unit) const {
    return values[((split * tiles + tile) * rows + row) * (units + 4) + unit];
  }
  // Of kRows sequences from `row` on, `stride` apart. Every step waits for these: the loads of several splits
  // and of all tiles are under way together.
  template <int kRows, int kTiles>
  FUSEDRNN_DEVICE void sums(int row, int stride, int unit, float (&total)[kRows][kTiles]) const {
    const int of_tile = rows * (units + 4);
    const float* from = values + row * (units + 4) + unit;
#pragma unroll
    for (auto& of_row : total)
#pragma unroll
      for (float& t : of_row) t = 0;
#pragma unroll(kTiles == 1 ? 4 : 2)
    for (int split = 0; split < splits; ++split, from += kTiles * of_tile)
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile)
          total[i][tile] += from[tile * of_tile + i * stride * (units + 4)];
  }
};

// What is at `from`, or zero outside.
template <class E>
FUSEDRNN_DEVICE E load_if(bool inside, const E* from) {
  E value = narrow<E>(0.0f);
  if (inside) value = *from;
  return value;
}

// Calls each(first, count) with constants for the elements of a thread, two at a time if it can have more
// than one: their chains of exponentials overlap where no branch parts them. The second of two may not be
// there.
template <class Each>
FUSEDRNN_DEVICE void for_elements(const Place& at, Each each) {
  if (at.rows <= at.row_stride) {
    if (at.has(0)) each(Constant<0>{}, Constant<1>{});
    return;
  }
  static_assert(kMaxElements == 4);
  if (at.has(0)) each(Constant<0>{}, Constant<2>{});
  if (at.has(2)) each(Constant<2>{}, Constant<2>{});
}

template <class Op, int kTiles, int kHeldSteps>
struct WarpWeights {
  static constexpr int kHeld = kHeldSteps;

  FragmentA held[kHeld > 0 ? kHeld : 1][kTiles];
  char* rest;  // [steps][kTiles] tiles

  // weight(tile, k0)(row, k): of row 0..15 of the warp's units and k of the step that begins with k0, which
  // counts over the whole operand. What a step has in common is computed once: short sequences are over soon.
  template <class Weight>
  FUSEDRNN_DEVICE WarpWeights(const Place& at, char* shared, Weight weight) : rest(shared) {
    const auto words = [&](int k_step, int tile, uint32_t (&out)[4]) {
      const auto of_step = weight(tile, k_step * Op::kStep);
#pragma unroll
      for (int w = 0; w < 4; ++w) out[w] = Op::word(lane_index(), w, of_step);
    };
    // Loads wait for a branch: of a chunk all steps are loaded, also those past the end, which are not
    // multiplied.
    constexpr int kLoaded = kChunk / kTiles;  // 64 loads are under way, and registers left for all else
#pragma unroll
    for (int first = 0; first < kHeld; first += kLoaded)
      if (at.first_k + first < at.end_k)
#pragma unroll
        for (int i = first; i < first + kLoaded && i < kHeld; ++i)
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) words(at.first_k + i, tile, held[i][tile].words);
    for (int k_step = at.first_k + kHeld; k_step < at.end_k; ++k_step) {
      Vector16 tiles[kTiles];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) words(k_step, tile, tiles[tile].words);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) *of_rest(at, k_step, tile) = tiles[tile];
    }
    // Of the rest a lane may read what others of its warp wrote: the barrier in the first publish is theirs
    // too.
  }

  FUSEDRNN_DEVICE Vector16* of_rest(const Place& at, int k_step, int tile) const {
    const int i = k_step - at.first_k - kHeld;
    return reinterpret_cast<Vector16*>(rest + (i * kTiles + tile) * 512 + lane_index() * 16);
  }
};

// The two sequences of a tile that a lane has sums of: where the tensor cores leave them; without those, such
// that lanes which load different ones meet in no bank of shared memory.
template <class Op>
FUSEDRNN_DEVICE int row_of_sum(int i) {
  const int q = lane_index() % 4;
  return Op::kTensorCore ? 2 * q + i : q + 4 * i;
}

template <class Op, int kTiles, int kHeld, class Exchange>
FUSEDRNN_DEVICE void multiply(const Place& at, const WarpWeights<Op, kTiles, kHeld>& weights,
                              const Exchange& exchange, uint32_t epoch, int batch_tile,
                              float (&sums)[kTiles * kChains<kTiles>][4]) {
  constexpr int kSums = kTiles * kChains<kTiles>;
  const int g = lane_index() / 4, q = lane_index() % 4;
  const int step_bytes = opaque(at.rows * 32);  // the offsets of all steps would fill the registers
  const char* operand = exchange.received(epoch);
  if constexpr (Op::kTensorCore) {
    operand += (batch_tile * kBatchTile + g) * 32 + q * 8;
    const auto load = [&](int first, int count, FragmentB(&b)[kChunk]) {
#pragma unroll
      for (int i = 0; i < kChunk; ++i)
        if (i < count && first + i < at.end_k) {
          const Vector8 v = Exchange::load(operand + (first + i) * step_bytes);
          b[i] = {{v.words[0], v.words[1]}};
        }
    };
    FragmentB b[kChunk];
#pragma unroll
    for (int held = 0; held < kHeld; held += kChunk) {
      load(at.first_k + held, kHeld - held, b);
#pragma unroll
      for (int i = 0; i < kChunk && i < kHeld - held; ++i)
        if (at.first_k + held + i < at.end_k)
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile)
            Op::mma(sums[i * kTiles % kSums + tile], weights.held[held + i][tile], b[i]);
    }
    for (int first = at.first_k + kHeld; first < at.end_k; first += kChunk) {
      load(first, kChunk, b);
#pragma unroll
      for (int i = 0; i < kChunk; ++i)
        if (first + i < at.end_k)
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            const Vector16 a = *weights.of_rest(at, first + i, tile);
            Op::mma(sums[i * kTiles % kSums + tile], {{a.words[0], a.words[1], a.words[2], a.words[3]}},
                    b[i]);
          }
    }
  } else {
    operand += (batch_tile * kBatchTile + row_of_sum<Op>(0)) * 32;
    for (int k_step = at.first_k; k_step < at.end_k; ++k_step)
#pragma unroll
      for (int piece = 0; piece < 4; ++piece) {
        const char* from = operand + k_step * step_bytes + piece * 8;
        const Vector8 b0 = Exchange::load(from), b1 = Exchange::load(from + 4 * 32);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          const auto* rows = reinterpret_cast<const Vector8*>(
              weights.rest + ((k_step - at.first_k) * kTiles + tile) * 512);  // [16][4]
          const Vector8 a0 = rows[g * 4 + piece], a1 = rows[(g + 8) * 4 + piece];
#pragma unroll
          for (int w = 0; w < 2; ++w) {
            const float x0 = float_of(b0.words[w]), x1 = float_of(b1.words[w]);
            sums[tile][0] += float_of(a0.words[w]) * x0;
            sums[tile][1] += float_of(a0.words[w]) * x1;
            sums[tile][2] += float_of(a1.words[w]) * x0;
            sums[tile][3] += float_of(a1.words[w]) * x1;
          }
        }
      }
  }
}

template <class Pass, template <class, int> class ExchangeOf>
FUSEDRNN_KERNEL(kMaxThreads)
persistent(FUSEDRNN_PARAMS typename Pass::Params p) {
  using Op = typename Pass::Operand;
  constexpr int kTiles = Pass::kTiles;
  using Exchange = ExchangeOf<typename Op::Element, Pass::kPublished>;
  constexpr PersistentPass kPass = Pass::kPass;
  constexpr int kHeld = held_steps(Exchange::kKind, kPass);
  const SharedLayout layout = shared_layout(p.plan, kPass);
  char* shared = shared_memory();

  const int unit_tile = warp_index() % p.plan.unit_tiles, split = warp_index() / p.plan.unit_tiles;
  const int64_t group = p.first_group + block_index() / p.plan.slices;
  Place at;
  at.rows = p.plan.rows();
  at.units = p.plan.units();
  at.slices = p.plan.slices;
  at.slice = static_cast<int>(block_index() % p.plan.slices);
  at.unit = thread_index() % at.units;
  at.row0 = thread_index() / at.units;
  at.row_stride = 2 * p.plan.k_splits;
  at.k_steps = static_cast<int>(k_steps(p.plan, kPass));
  const int steps_of_warp = static_cast<int>(k_steps_of_warp(p.plan, kPass));
  at.first_k = split * steps_of_warp;
  at.end_k = at.first_k + steps_of_warp < at.k_steps ? at.first_k + steps_of_warp : at.k_steps;

  char* workspace = p.workspace + group * p.group_bytes;
  Deadline deadline(p.status);
  Exchange exchange(at, layout, shared, workspace,
                    reinterpret_cast<uint32_t*>(workspace + 2 * layout.operand_bytes), deadline);

  const int rest = steps_of_warp - kHeld;
  const WarpWeights<Op, kTiles, kHeld> weights(
      at, shared + layout.weights + warp_index() * (rest > 0 ? rest : 0) * kTiles * 512,
      Pass::weights(p, at, group, kTile * unit_tile));
  Pass pass(
      p, at, group,
      reinterpret_cast<float*>(shared + layout.prefetch) + thread_index() * prefetch_stride(p.plan, kPass));
  const Partial partial{reinterpret_cast<float*>(shared + layout.partial), p.plan.k_splits, kTiles, at.rows,
                        at.units};

  const int T = pass.steps();
  pass.begin(exchange);
  for (int s = 0; s < T; ++s) {
    const auto epoch = static_cast<uint32_t>(s);
    exchange.publish(epoch);
    pass.prefetch(s);
    exchange.receive(epoch);
    for (int batch_tile = 0; batch_tile < p.plan.batch_tiles; ++batch_tile) {
      float sums[kTiles * kChains<kTiles>][4] = {};
      multiply<Op>(at, weights, exchange, epoch, batch_tile, sums);
#pragma unroll
      for (int chain = kTiles; chain < kTiles * kChains<kTiles>; ++chain)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[chain % kTiles][i] += sums[chain][i];
      const int unit = kTile * unit_tile + lane_index() / 4;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = batch_tile * kBatchTile + row_of_sum<Op>(i % 2);
          partial.at(split, tile, row, unit + 8 * (i / 2)) = sums[tile][i];
        }
    }
    sync_block();
    copy_async_wait();
    pass.step(s, partial, exchange);
  }
  pass.end();
  exchange.leave();
}

}  // namespace fusedrnn::cuda
