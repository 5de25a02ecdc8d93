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

void launch(const Call& call, const Forward& forward, const PersistentPlan& plan, const Place& place);
void launch(const Call& call, const Backward& backward, const PersistentPlan& plan, const Place& place);

// Throws if a launch on the device has failed that nobody was told of yet: launches return before they end.
void check_earlier_launches(const Place& place);

}  // namespace fusedrnn::cuda
