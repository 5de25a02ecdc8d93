// A kernel with a fault of choice, or none, to show that the emulator finds each.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "../cuda/launch.h"
#include "../cuda/primitives/copy.h"
#include "../cuda/primitives/flag.h"
#include "../cuda/primitives/mbarrier.h"
#include "../cuda/primitives/mma.h"
#include "buffers.h"
#include "emulation.h"

namespace fusedrnn::faults {

using namespace device;

enum class Fault {
  kNone,
  kRace,             // reads what another thread wrote, with no barrier between
  kUnwritten,        // reads shared memory that nobody wrote
  kPastShared,       // writes past the shared memory of its block
  kBeforeShared,     // ... and before it
  kPastGlobal,       // writes past a tensor
  kMissingThreads,   // a warp ends before a barrier of its block
  kMixedBarriers,    // the warps of a block are in two barriers at once
  kCrossedBarriers,  // one warp waits for its block, the other for its cluster
  kPartialProduct,   // a lane of a warp stays away from a product
  kLostFlag,         // waits for a flag that nobody sets
  kDepartedPeer,     // stores to a block that has ended
  kUnknownBarrier,   // uses a peer's mbarrier, which that need not have made yet
  kSecondInit,       // makes an mbarrier twice
  kSurplusArrival,   // arrives at an mbarrier more often than it expects
};

inline const std::vector<std::pair<const char*, Fault>> kFaults = {
    {"none", Fault::kNone},
    {"race", Fault::kRace},
    {"unwritten", Fault::kUnwritten},
    {"past_shared", Fault::kPastShared},
    {"before_shared", Fault::kBeforeShared},
    {"past_global", Fault::kPastGlobal},
    {"missing_threads", Fault::kMissingThreads},
    {"mixed_barriers", Fault::kMixedBarriers},
    {"crossed_barriers", Fault::kCrossedBarriers},
    {"partial_product", Fault::kPartialProduct},
    {"lost_flag", Fault::kLostFlag},
    {"departed_peer", Fault::kDepartedPeer},
    {"unknown_barrier", Fault::kUnknownBarrier},
    {"second_init", Fault::kSecondInit},
    {"surplus_arrival", Fault::kSurplusArrival},
};

inline constexpr int kFaultyThreads = 64, kFaultyBlocks = 2;
inline constexpr int kFaultyShared = 128 + 2 * 4 * kFaultyThreads;  // mbarrier; values; as much again, unused

struct FaultyParams {
  Fault fault;
  const float* in;  // [blocks, threads]
  float* out;       // [blocks, threads]: in[block, thread + 1]
  uint32_t *flag, *status;
};

inline void faulty(FaultyParams p) {
  const Fault fault = p.fault;
  const int thread = thread_index();
  const bool first_warp = warp_index() == 0;
  auto* barrier = reinterpret_cast<Mbarrier*>(shared_memory());
  auto* values = reinterpret_cast<float*>(shared_memory() + 128);
  Deadline deadline(p.status);

  if (fault == Fault::kDepartedPeer && block_index() == 1) return;
  if (thread == 0) {
    mbarrier_init(barrier, 1);
    if (fault == Fault::kSecondInit) mbarrier_init(barrier, 1);
    fence_mbarrier_init();
  }
  if (fault != Fault::kUnknownBarrier && fault != Fault::kDepartedPeer) sync_cluster();
  if (thread == 0 && (fault == Fault::kUnknownBarrier || fault == Fault::kDepartedPeer))
    remote_store(values, 1 - cluster_rank(), {}, barrier);
  if (thread == 0 && fault == Fault::kSurplusArrival) {
    mbarrier_expect(barrier, 16);
    mbarrier_expect(barrier, 16);
  }
  if (fault == Fault::kLostFlag) flag_wait(p.flag, 1, deadline);
  if (fault == Fault::kPartialProduct && thread != 5) {
    float sums[4] = {};
    mma_tf32(sums, {}, {});
  }
  if (fault == Fault::kMissingThreads && !first_warp) return;
  if (fault == Fault::kMixedBarriers && first_warp) sync_block();
  if (fault == Fault::kCrossedBarriers && first_warp) sync_cluster();

  const int64_t block = block_index() * kFaultyThreads;
  copy_async(&values[thread], &p.in[block + thread]);
  copy_async_wait();
  if (fault != Fault::kRace) sync_block();
  const float* from = fault == Fault::kUnwritten ? values + kFaultyThreads : values;
  p.out[block + thread] = from[(thread + 1) % kFaultyThreads];
  if (thread != 0) return;
  if (fault == Fault::kPastShared) shared_memory()[kFaultyShared] = 1;
  if (fault == Fault::kBeforeShared) shared_memory()[-1] = 1;
  if (fault == Fault::kPastGlobal) p.out[kFaultyBlocks * kFaultyThreads] = 1;
}

}  // namespace fusedrnn::faults

namespace fusedrnn::emulator {

inline Outcome run_faulty(faults::Fault fault) {
  using namespace faults;
  constexpr int kAll = kFaultyBlocks * kFaultyThreads;
  Buffer in(cuda::Number::kFloat, kAll), out(cuda::Number::kFloat, kAll);
  for (int i = 0; i < kAll; ++i) in.set(i, i);
  uint32_t flag = 0, status = 0;
  cuda::launch(
      &faulty,
      {fault, reinterpret_cast<float*>(in.begin()), reinterpret_cast<float*>(out.begin()), &flag, &status},
      {kFaultyBlocks, kFaultyThreads, kFaultyShared, kFaultyBlocks, false}, nullptr);
  if (!out.guards_hold()) return {"a store outside the bounds of out", false};
  if (status) return {"", true};
  const Values values = out.values();
  for (int i = 0; i < kAll; ++i)
    if (const int want = i / kFaultyThreads * kFaultyThreads + (i + 1) % kFaultyThreads; values[i] != want)
      return {
          "out[" + std::to_string(i) + "] is " + std::to_string(values[i]) + ", not " + std::to_string(want),
          false};
  return {};
}

}  // namespace fusedrnn::emulator
