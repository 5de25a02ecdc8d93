// How a sequence is executed: pure functions of the problem and the device, testable anywhere.
#pragma once

#include <cstdint>
#include <vector>

#include "cells/cell.h"  // FUSEDRNN_HD
#include "sequence.h"

namespace fusedrnn {

// The resident CPU schedule: the batch of each recurrence is cut in `row_chunks` that never meet, and the
// hidden units of a chunk in `unit_slices` that exchange h after every step.
struct ResidentPlan {
  int64_t row_chunks;
  int64_t unit_slices;
  const int64_t* row_bounds;  // [row_chunks + 1] of the batch, from balanced_rows
};

inline constexpr int64_t kMaxUnitSlices = 64;

struct CpuDevice {
  int64_t threads;
  int64_t cache_bytes;  // private to a core
};

// bytes_hh: size of one recurrence's W_hh as the kernel holds it. units_per_slice: the least a slice may
// have. Leaves row_bounds to be filled in.
ResidentPlan plan_resident(int64_t N, int64_t B, int64_t H, int64_t bytes_hh, bool projected,
                           int64_t units_per_slice, const CpuDevice& device);

// Where the blocks of a group hand over the operand of their next step.
enum class Exchange {
  kBlock,
  kCluster,
  kGrid
};  // own shared memory, that of the cluster, global memory (L2)

inline constexpr int kTile = 16, kBatchTile = 8;  // units and sequences of one tensor-core product
inline constexpr int kMaxWarps = 8;               // of a block: each holds up to 128 registers of weights
inline constexpr int kMaxThreads = 32 * kMaxWarps;
inline constexpr int kClusterSizes = 4;  // 2, 4, 8 and 16 blocks
inline constexpr int kMaxElements = 4;   // (unit, sequence) pairs whose state a thread carries

// A persistent schedule. A group of `slices` blocks runs one recurrence for 8 * batch_tiles sequences; each
// block owns U = 16 * unit_tiles units, and its unit_tiles * k_splits warps share the products of a step.
struct PersistentPlan {
  Exchange exchange;
  int slices;
  int unit_tiles;
  int k_splits;     // warps of a unit tile, each with a part of the K dimension
  int batch_tiles;  // at most k_splits, so that kMaxElements are enough
  int groups;       // at once in a launch; more are left to launches after it

  FUSEDRNN_HD int units() const { return kTile * unit_tiles; }
  FUSEDRNN_HD int rows() const { return kBatchTile * batch_tiles; }
  FUSEDRNN_HD int threads() const { return 32 * unit_tiles * k_splits; }
  FUSEDRNN_HD int elements() const { return (batch_tiles * 4 + k_splits - 1) / k_splits; }
};

// What the plan must know of a kernel: a cell, its dtype and a direction.
struct PersistentPass {
  int m_tiles;         // tiles of 16 rows that a warp multiplies: G forward, 1 backward
  int published;       // values handed over per unit: 1 forward, G backward
  int prefetched;      // floats per element that are copied ahead of a step
  int register_steps;  // 32-byte steps of K whose weights a warp holds in registers; 0: no tensor cores
  int element_bytes;   // of an operand
};

// Shared memory of a block, in bytes from its begin.
struct SharedLayout {
  int64_t barriers, operand, operand_bytes, partial, prefetch, staging, weights, bytes;
};

struct GpuDevice {
  int multiprocessors;
  int64_t shared_bytes;         // that a block can have
  int clusters[kClusterSizes];  // of 2, 4, 8, ... blocks: how many it runs at once, a multiprocessor a block.
                                // Fewer than its multiprocessors would hold: a cluster lies within one
                                // part of the device
  bool cooperative;             // can start a grid whose blocks are all resident

  int clusters_of(int64_t blocks) const {
    for (int i = 0; i < kClusterSizes; ++i)
      if (blocks == 2 << i) return clusters[i];
    return 0;
  }
  // Blocks of the largest cluster it grants; 0: it has none.
  int max_cluster() const {
    for (int i = kClusterSizes; i > 0; --i)
      if (clusters[i - 1] > 0) return 1 << i;
    return 0;
  }
};

struct GpuProblem {
  PersistentPass pass;
  int64_t N, B, H;
};

// The persistent plans that fit, the fastest by a model of the hardware first. None: the stepwise schedule.
std::vector<PersistentPlan> plan_persistent(const GpuProblem& problem, const GpuDevice& device);

// Whether the kernels and the device can have a plan; sets its groups if so.
bool complete(PersistentPlan& plan, const GpuProblem& problem, const GpuDevice& device);

// Clock cycles of a step of all groups, as that model has it; by a plan, and by the stepwise schedule.
double cycles_of(const PersistentPlan& plan, const GpuProblem& problem, const GpuDevice& device);
double stepwise_cycles(const GpuProblem& problem, const GpuDevice& device);

// Whether that model expects the stepwise schedule to be done first: large batches of large cells fill the
// device with each step.
bool stepwise_is_faster(const PersistentPlan& plan, const GpuProblem& problem, const GpuDevice& device);

// Steps of K, of 32 bytes per sequence, of the whole operand.
FUSEDRNN_HD int64_t k_steps(const PersistentPlan& plan, const PersistentPass& pass) {
  return int64_t{plan.slices} * kTile * plan.unit_tiles * pass.published * pass.element_bytes / 32;
}
FUSEDRNN_HD int64_t k_steps_of_warp(const PersistentPlan& plan, const PersistentPass& pass) {
  return (k_steps(plan, pass) + plan.k_splits - 1) / plan.k_splits;
}

// Of those, how many have their weights in registers: loads from global memory need some for themselves.
FUSEDRNN_HD constexpr int held_steps(Exchange exchange, const PersistentPass& pass) {
  if (exchange != Exchange::kGrid || pass.register_steps == 0) return pass.register_steps;
  return pass.register_steps - (pass.m_tiles == 1 ? 8 : 1);
}

// Bytes of weights that the registers of a block hold; the rest of its share is in shared memory.
FUSEDRNN_HD int64_t register_bytes(const PersistentPlan& plan, const PersistentPass& pass) {
  const int64_t held = held_steps(plan.exchange, pass), steps = k_steps_of_warp(plan, pass);
  return (held < steps ? held : steps) * plan.unit_tiles * plan.k_splits * pass.m_tiles * 512;
}

// Floats from what is copied ahead for a thread to what is for the next one: odd, so that the threads of
// a warp meet in no bank. Elements are computed two at a time, if there is more than one.
FUSEDRNN_HD int prefetch_stride(const PersistentPlan& plan, const PersistentPass& pass) {
  const int elements = plan.elements() == 1 ? 1 : (plan.elements() + 1) / 2 * 2;
  return elements * pass.prefetched | 1;
}

FUSEDRNN_HD SharedLayout shared_layout(const PersistentPlan& plan, const PersistentPass& pass) {
  const int64_t threads = plan.threads(), rows = kBatchTile * plan.batch_tiles;
  const int64_t buffers = plan.exchange == Exchange::kBlock ? 1 : plan.exchange == Exchange::kCluster ? 2 : 0;
  const int64_t rest = k_steps_of_warp(plan, pass) - held_steps(plan.exchange, pass);
  SharedLayout at{};
  at.operand = 128;  // after the barriers
  at.operand_bytes = k_steps(plan, pass) * rows * 32;
  at.partial = at.operand + buffers * at.operand_bytes;
  at.prefetch = at.partial + plan.k_splits * pass.m_tiles * rows * (kTile * plan.unit_tiles + 4) * 4;
  at.staging = at.prefetch + threads * prefetch_stride(plan, pass) * 4;
  at.weights =
      at.staging + (buffers == 2 ? plan.elements() * pass.published * threads * pass.element_bytes : 0);
  at.bytes = at.weights + (rest > 0 ? rest : 0) * plan.unit_tiles * plan.k_splits * pass.m_tiles * 512;
  return at;
}

// Bounds that give each chunk of the batch its share of the rows, not of the sequences.
std::vector<int64_t> balanced_rows(const Steps& steps, int64_t chunks);

}  // namespace fusedrnn
