#include "plan.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

namespace fusedrnn {

ResidentPlan plan_resident(int64_t N, int64_t B, int64_t H, int64_t bytes_hh, bool projected,
                           int64_t units_per_slice, const CpuDevice& device) {
  const int64_t workers = std::max<int64_t>(1, device.threads / std::max<int64_t>(1, N));
  const int64_t slices = std::min({workers, H / units_per_slice, kMaxUnitSlices});
  // A step that is short next to a hand-over (half a microsecond, about 64 KiB of weights) is left to one
  // worker.
  const bool worth = !projected && slices > 1 && bytes_hh * B >= (int64_t{128} << 10);
  // Chunks of the batch need no hand-over, but each reads all weights at every step: that pays while they
  // stay in the core's own cache, which gates and h share with them.
  if (worth && (B < 2 * workers || bytes_hh > device.cache_bytes / 2)) return {1, slices, nullptr};
  return {std::clamp<int64_t>(B, 1, workers), 1, nullptr};
}

namespace {

// What a step of a persistent plan takes: a model in clock cycles of a Hopper multiprocessor, there only to
// put plans in order. Its figures are those of published measurements, or estimates where that is said: this
// project has measured none of them on a device. Whether a plan is possible depends on none of them.
constexpr double kClock = 1.7;          // cycles per nanosecond, under load
constexpr double kBarrier = 30;         // the warps of a block wait for each other: estimate
constexpr double kSharedLatency = 29;   // a load from the block's own shared memory
constexpr double kRemoteLatency = 190;  // from shared memory to that of a peer, whatever the cluster's size
constexpr double kL2Latency = 470;      // between a block and the far half of L2: the slowest of many decides
constexpr double kFlag = 160 * kClock;  // a flag through L2, one way
constexpr double kSharedRate = 128;     // bytes per cycle: 32 banks of 4
constexpr double kRemoteRate = 14;      // bytes per cycle: 2.7 to 3.3 TB/s over the chip's cluster network
constexpr double kL2Rate = 38;          // bytes per cycle into a multiprocessor
constexpr int kStepsInFlight = 8;       // steps of K that a warp loads before it waits for them
constexpr int kSchedulers = 4;          // of a multiprocessor, each with a tensor core
constexpr double kProductLatency = 24;  // of m16n8k16, until the next that adds to its result
constexpr int kChains = 4;              // sums that the products of a single tile alternate between
constexpr double kProductIssue = 6.5;   // 2048 multiplications at 62 % of the 512 a cycle of a tensor core
constexpr double kProductIssueFp32 = 32;  // 1024 multiplications by the 32 lanes of a scheduler
constexpr double kWholeProduct = 0.5;  // of the peak, that a library's product of one step reaches: estimate
constexpr double kStepLaunches = 5e3 * kClock;  // for a kernel started from the host: estimate
constexpr double kCellLatency = 350;            // from sums to the next h, a chain of exponentials: estimate
constexpr double kCellIssue = 100;  // instructions of a warp for an element of each thread: estimate

int64_t ceil_divide(int64_t a, int64_t b) { return a / b + (a % b != 0); }

double step_cycles(const PersistentPlan& plan, const GpuProblem& problem) {
  const PersistentPass& pass = problem.pass;
  const bool tensor_core = pass.register_steps > 0;  // without, as in ieee fp32, no weight is in registers
  const int warps = plan.unit_tiles * plan.k_splits;
  const int64_t steps = k_steps_of_warp(plan, pass), turns = ceil_divide(warps, kSchedulers);
  const auto operand = static_cast<double>(shared_layout(plan, pass).operand_bytes);
  const auto live_rows = static_cast<double>(std::min<int64_t>(plan.rows(), problem.B));

  // From the last value that a peer stores until it can be loaded here.
  double hand_over = 0;
  switch (plan.exchange) {
    case Exchange::kBlock:
      hand_over = kBarrier;
      break;
    case Exchange::kCluster:  // gathered to 16 bytes in shared memory, sent, waited for
      hand_over = kSharedLatency + kRemoteLatency + kBarrier + operand / kRemoteRate;
      break;
    case Exchange::kGrid:  // values are in L2 before the flag is
      hand_over = kBarrier + kL2Latency + kFlag;
      break;
  }

  // Each tile of units loads the whole operand, each warp in rounds that wait for one another.
  const bool grid = plan.exchange == Exchange::kGrid;
  const double latency = grid ? kL2Latency : kSharedLatency, rate = grid ? kL2Rate : kSharedRate;
  const int64_t rounds = plan.batch_tiles * (tensor_core ? ceil_divide(steps, kStepsInFlight) : steps);
  const double loads =
      latency + std::max(latency * static_cast<double>(rounds - 1), plan.unit_tiles * operand / rate);

  const auto rest = static_cast<double>(std::max<int64_t>(0, steps - held_steps(plan.exchange, pass)));
  const double weights = rest * warps * pass.m_tiles * 512 * plan.batch_tiles / kSharedRate;

  // A step of K waits for an earlier one, unless the scheduler has other products to start meanwhile.
  const double issue = tensor_core ? kProductIssue : kProductIssueFp32;
  const double products = static_cast<double>(plan.batch_tiles * steps) *
                          std::max(kProductLatency / (pass.m_tiles == 1 ? kChains : 1),
                                   issue * static_cast<double>(turns * pass.m_tiles));

  const double row_of_sums = plan.k_splits * pass.m_tiles * plan.units() * 4.0;  // bytes
  const double sums = row_of_sums * (plan.rows() + live_rows) / kSharedRate + kBarrier + kSharedLatency;

  // The warps of a scheduler share what it issues; a thread computes two elements at a time.
  const double issued = plan.units() * live_rows / 128, pairs = std::ceil(live_rows / (4 * plan.k_splits));
  const double cell = std::max(kCellLatency * pairs, kCellIssue * issued);

  return hand_over + loads + weights + products + sums + cell;
}

int64_t groups_of(const PersistentPlan& plan, const GpuProblem& problem) {
  const int64_t of_batch = ceil_divide(problem.B, plan.rows()), most = std::numeric_limits<int64_t>::max();
  return problem.N > most / of_batch ? most : problem.N * of_batch;
}

// A block has a multiprocessor to itself: eight warps with their weights fill its registers.
int64_t groups_at_once(const PersistentPlan& plan, const GpuDevice& device) {
  if (plan.exchange == Exchange::kCluster) return std::max(1, device.clusters_of(plan.slices));
  return std::max(1, device.multiprocessors / plan.slices);
}

bool grants(const GpuDevice& device, Exchange exchange, int64_t slices) {
  if (slices > device.multiprocessors) return false;
  switch (exchange) {
    case Exchange::kBlock:
      return slices == 1;
    case Exchange::kCluster:
      return device.clusters_of(slices) > 0;
    case Exchange::kGrid:
      return slices >= 2 && device.cooperative;
  }
  return false;
}

}  // namespace

double cycles_of(const PersistentPlan& plan, const GpuProblem& problem, const GpuDevice& device) {
  return step_cycles(plan, problem) *
         static_cast<double>(ceil_divide(groups_of(plan, problem), groups_at_once(plan, device)));
}

double stepwise_cycles(const GpuProblem& problem, const GpuDevice& device) {
  const auto [pass, N, B, H] = problem;
  const double rate = (pass.register_steps > 0 ? 2048 : 128) * kWholeProduct * device.multiprocessors;
  return kStepLaunches * (N + 1) + 1.0 * pass.m_tiles * pass.published * N * H * H * B / rate;
}

std::vector<PersistentPlan> plan_persistent(const GpuProblem& problem, const GpuDevice& device) {
  const auto [pass, N, B, H] = problem;
  if (N <= 0 || B <= 0 || H <= 0) return {};
  struct Candidate {
    PersistentPlan plan;
    double cycles;  // for a step of all groups
  };
  std::vector<Candidate> candidates;
  const auto consider = [&](PersistentPlan plan) {
    if (complete(plan, problem, device)) candidates.push_back({plan, cycles_of(plan, problem, device)});
  };
  for (Exchange exchange : {Exchange::kBlock, Exchange::kCluster, Exchange::kGrid})
    for (int unit_tiles = 1; unit_tiles <= kMaxWarps; ++unit_tiles) {
      int64_t slices = ceil_divide(H, kTile * unit_tiles);
      if (exchange == Exchange::kCluster)
        slices = static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(std::max<int64_t>(slices, 2))));
      if (!grants(device, exchange, slices)) continue;
      for (int k_splits = 1; unit_tiles * k_splits <= kMaxWarps; ++k_splits)
        for (int batch_tiles = 1; batch_tiles <= k_splits; ++batch_tiles)
          consider({exchange, static_cast<int>(slices), unit_tiles, k_splits, batch_tiles, 0});
    }
  std::stable_sort(candidates.begin(), candidates.end(),
                   [](const Candidate& a, const Candidate& b) { return a.cycles < b.cycles; });
  // The best for each number of slices: enough to fall back on where a device grants less than it said.
  std::vector<PersistentPlan> plans;
  for (const Candidate& candidate : candidates) {
    const auto alike = [&plan = candidate.plan](const PersistentPlan& better) {
      return better.exchange == plan.exchange && better.slices == plan.slices;
    };
    if (std::none_of(plans.begin(), plans.end(), alike)) plans.push_back(candidate.plan);
  }
  return plans;
}

bool complete(PersistentPlan& plan, const GpuProblem& problem, const GpuDevice& device) {
  if (plan.unit_tiles < 1 || plan.k_splits < 1 || plan.unit_tiles > kMaxWarps || plan.k_splits > kMaxWarps ||
      plan.unit_tiles * plan.k_splits > kMaxWarps || plan.batch_tiles < 1 ||
      plan.batch_tiles > plan.k_splits || !grants(device, plan.exchange, plan.slices) ||
      int64_t{plan.slices} * plan.units() < problem.H ||
      shared_layout(plan, problem.pass).bytes > device.shared_bytes)
    return false;
  // The blocks of a grid must all be resident, since they wait for each other. The device starts those of
  // other groups when there is room; their number in a launch is that of an int.
  const int64_t launched = plan.exchange == Exchange::kGrid ? groups_at_once(plan, device)
                                                            : std::numeric_limits<int>::max() / plan.slices;
  plan.groups = static_cast<int>(std::min(groups_of(plan, problem), launched));
  return true;
}

bool stepwise_is_faster(const PersistentPlan& plan, const GpuProblem& problem, const GpuDevice& device) {
  return cycles_of(plan, problem, device) > stepwise_cycles(problem, device);
}

std::vector<int64_t> balanced_rows(const Steps& steps, int64_t chunks) {
  std::vector<int64_t> bounds{0};
  int64_t taken = 0;
  for (int64_t b = 0, t = steps.T; b < steps.B; ++b) {
    while (t > 0 && steps.count(t - 1) <= b) --t;  // t: length of sequence b
    taken += t;
    const auto chunk = static_cast<int64_t>(bounds.size());
    if (chunk < chunks && (taken * chunks >= steps.rows() * chunk || steps.B - b - 1 == chunks - chunk))
      bounds.push_back(b + 1);
  }
  bounds.resize(chunks + 1, steps.B);
  return bounds;
}

}  // namespace fusedrnn
