// Which schedule runs a sequence on a device, and the launch of a persistent one: what turns a block that was
// never started into an exception.
#pragma once

#include <optional>

#include "../cuda/kernels.h"
#include "call.h"

namespace fusedrnn::cuda {

// Where the tensors of a call are.
struct Place {
  int device;
  void* stream;
};

Number number_of(ScalarType dtype);

// The plan by which a pass runs, or none: step by step. Throws if FUSEDRNN_SCHEDULE demands what cannot be.
std::optional<PersistentPlan> choose_plan(const Call& call, bool backward, const Place& place);

// What plan_of returns. First the device: multiprocessors, bytes of shared memory that a block can have,
// blocks of its largest cluster, whether it starts cooperative grids; the index of the chosen candidate, -1
// if the pass runs step by step; and the model's cycles of a step by step. Then, for each persistent plan
// that fits, in the planner's order: exchange, slices, unit tiles, K splits, batch tiles, groups, bytes of
// shared memory and of weights in registers of a block, the model's cycles, whether the device keeps it
// resident.
std::vector<int64_t> candidates(const Call& call, bool backward, const Place& place);

void launch(const Call& call, const Forward& forward, const PersistentPlan& plan, const Place& place);
void launch(const Call& call, const Backward& backward, const PersistentPlan& plan, const Place& place);

// Throws if a launch on the device has failed that nobody was told of yet: launches return before they end.
void check_earlier_launches(const Place& place);

}  // namespace fusedrnn::cuda
