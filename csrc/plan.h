// How a sequence is executed: pure functions of the problem and the device, testable anywhere.
#pragma once

#include <cstdint>
#include <vector>

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

// Bounds that give each chunk of the batch its share of the rows, not of the sequences.
std::vector<int64_t> balanced_rows(const Steps& steps, int64_t chunks);

}  // namespace fusedrnn
