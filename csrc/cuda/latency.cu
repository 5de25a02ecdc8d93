// Measures what the exchanges are made of, on the current device: the figures behind the model in plan.cpp.
// Also says which plans that model puts in which order there.
//
// A measurement is a kernel that repeats one operation, or a chain of operations that wait for one another,
// and notes the clock cycles and nanoseconds of all rounds. Every loop is counted, and every wait bounded.
#include <cuda/ptx>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"
#include "launch.h"
#include "primitives/copy.h"
#include "primitives/flag.h"
#include "primitives/mbarrier.h"
#include "primitives/mma.h"

namespace fusedrnn::cuda {
namespace {

using namespace device;

struct Result {
  int64_t cycles, nanoseconds;
  uint32_t unused;  // what the kernel computed, so that it is computed
  uint32_t status;
};

struct Params {
  int rounds, blocks;
  int count;  // chase_l2: lines of the ring; cluster_gather: packets for each block; grid_gather and
              // cluster_multicast: bytes of all
  Result* result;
  char* memory;  // kMemoryBytes
};

constexpr int kThreads = 256, kWarp = 32, kLinks = 64, kLine = 128, kUnroll = 16;
constexpr int kMemoryBytes = 1 << 20, kFlagBytes = 1 << 10;

struct Time {
  int64_t cycles, nanoseconds;
};

// By all threads of a block.
FUSEDRNN_DEVICE Time now() {
  sync_block();
  const Time time{clock64(), nanoseconds()};
  sync_block();
  return time;
}

FUSEDRNN_DEVICE void finish(const Params& p, const Time& begin, uint32_t unused) {
  const Time end = now();
  if (block_index() != 0 || thread_index() != 0) return;
  p.result->cycles = end.cycles - begin.cycles;
  p.result->nanoseconds = end.nanoseconds - begin.nanoseconds;
  p.result->unused = unused;
}

using Kernel = void (*)(Params);
#define FUSEDRNN_MEASUREMENT(name) FUSEDRNN_KERNEL(kThreads) name(FUSEDRNN_PARAMS Params p)

// Loads whose address is what the load before them brought.

FUSEDRNN_MEASUREMENT(chase_shared) {
  auto* ring = reinterpret_cast<uint32_t*>(shared_memory());
  for (int i = thread_index(); i < kLinks; i += kWarp) ring[i] = (i + 1) % kLinks * sizeof *ring;
  uint32_t at = 0;
  const Time begin = now();
  for (int round = 0; round < p.rounds; ++round)
    at = *reinterpret_cast<const uint32_t*>(shared_memory() + at);
  finish(p, begin, at);
}

// Block 0 follows a ring in the shared memory of the last block of its cluster.
FUSEDRNN_MEASUREMENT(chase_remote) {
  sync_cluster();
#if __CUDA_ARCH__ >= 900
  if (cluster_rank() == 0) {
    auto* ring = static_cast<uint64_t*>(__cluster_map_shared_rank(shared_memory(), p.blocks - 1));
    for (int i = thread_index(); i < kLinks; i += kWarp)
      ring[i] = reinterpret_cast<uint64_t>(&ring[(i + 1) % kLinks]);
    const uint64_t* at = ring;
    const Time begin = now();
    for (int round = 0; round < p.rounds; ++round) at = reinterpret_cast<const uint64_t*>(*at);
    finish(p, begin, static_cast<uint32_t>(at - ring));
  }
#endif
  sync_cluster();
}

// The ring jumps about: neighbouring lines are in one part of L2.
FUSEDRNN_MEASUREMENT(chase_l2) {
  constexpr int kJump = 4099;
  for (int i = thread_index(); i < p.count; i += kWarp)
    *reinterpret_cast<uint64_t*>(p.memory + i * kLine) =
        reinterpret_cast<uint64_t>(p.memory + (i + kJump) % p.count * kLine);
  uint64_t at = reinterpret_cast<uint64_t>(p.memory);
  const Time begin = now();
  for (int round = 0; round < p.rounds; ++round) {
    const Vector8 v = load_fresh(reinterpret_cast<const void*>(at));
    at = uint64_t{v.words[1]} << 32 | v.words[0];
  }
  finish(p, begin, static_cast<uint32_t>(at));
}

// Two blocks that answer each other. A receiver announces its next packet after it has sent, not before.
FUSEDRNN_MEASUREMENT(cluster_ping_pong) {
  auto* barrier = reinterpret_cast<Mbarrier*>(shared_memory());
  char* packet = shared_memory() + kLine;
  const int rank = cluster_rank(), peer = rank == 0 ? p.blocks - 1 : 0;
  const bool speaks = thread_index() == 0 && (rank == 0 || rank == p.blocks - 1);
  Deadline deadline(&p.result->status);
  if (thread_index() == 0) {
    mbarrier_init(barrier, 1);
    fence_mbarrier_init();
    mbarrier_expect(barrier, sizeof(Vector16));
  }
  sync_cluster();
  const Time begin = now();
  if (speaks)
    for (int round = 0; round < p.rounds; ++round) {
      if ((round & 1) == (rank != 0)) {
        remote_store(packet, peer, Vector16{}, barrier);
        if (round > 0) mbarrier_expect(barrier, sizeof(Vector16));
      } else {
        mbarrier_wait(barrier, round >> 1 & 1, deadline);
      }
    }
  finish(p, begin, 0);
  sync_cluster();
}

// At the beginning of the shared memory, for rounds in turn. By all threads of the cluster.
FUSEDRNN_DEVICE Mbarrier* two_barriers() {
  auto* barriers = reinterpret_cast<Mbarrier*>(shared_memory());
  if (thread_index() == 0) {
    mbarrier_init(&barriers[0], 1);
    mbarrier_init(&barriers[1], 1);
    fence_mbarrier_init();
  }
  sync_cluster();
  return barriers;
}

// The step of a cluster exchange: every block sends p.count packets, a power of two, to all blocks and waits
// for those of all.
FUSEDRNN_MEASUREMENT(cluster_gather) {
  Mbarrier* barriers = two_barriers();
  const int packets = p.count * p.blocks, shift = __ffs(p.count) - 1;
  Deadline deadline(&p.result->status);
  const Time begin = now();
  for (int round = 0; round < p.rounds && !deadline.expired(); ++round) {
    Mbarrier* barrier = &barriers[round & 1];
    char* mine = shared_memory() + kLine +
                 ((round & 1) * packets + cluster_rank() * p.count) * static_cast<int>(sizeof(Vector16));
    if (thread_index() == 0) mbarrier_expect(barrier, packets * static_cast<int>(sizeof(Vector16)));
    sync_warp();
    for (int i = thread_index(); i < packets; i += threads_of_block())
      remote_store(mine + (i & (p.count - 1)) * sizeof(Vector16), i >> shift, Vector16{}, barrier);
    mbarrier_wait(barrier, round >> 1 & 1, deadline);
  }
  finish(p, begin, 0);
  sync_cluster();
}

// What blocks of a cluster have in common comes from L2 once: every block multicasts its part of p.count
// bytes to all and waits for those of all.
FUSEDRNN_MEASUREMENT(cluster_multicast) {
#if __CUDA_ARCH__ >= 900
  Mbarrier* barriers = two_barriers();
  const int part = p.count / p.blocks, from = cluster_rank() * part;
  const auto everyone = static_cast<uint16_t>((1 << p.blocks) - 1);
  Deadline deadline(&p.result->status);
  const Time begin = now();
  for (int round = 0; round < p.rounds && !deadline.expired(); ++round) {
    Mbarrier* barrier = &barriers[round & 1];
    if (thread_index() == 0) {
      mbarrier_expect(barrier, p.count);
      ::cuda::ptx::cp_async_bulk(::cuda::ptx::space_cluster, ::cuda::ptx::space_global,
                                 shared_memory() + kLine + from, p.memory + from, part, barrier, everyone);
    }
    sync_warp();
    mbarrier_wait(barrier, round >> 1 & 1, deadline);
  }
  finish(p, begin, 0);
#endif
  sync_cluster();
}

FUSEDRNN_MEASUREMENT(flag_ping_pong) {
  auto* flags = reinterpret_cast<uint32_t*>(p.memory);
  const int block = static_cast<int>(block_index());
  Deadline deadline(&p.result->status);
  const Time begin = now();
  if (thread_index() == 0)
    for (int round = 0; round < p.rounds; ++round) {
      if ((round & 1) == block)
        flag_set(&flags[(1 - block) * kWarp], round + 1);
      else
        flag_wait(&flags[block * kWarp], round + 1, deadline);
    }
  finish(p, begin, 0);
}

// A barrier of the grid, made of flags: every block sets its own and waits for those of all.
FUSEDRNN_MEASUREMENT(flag_gather) {
  auto* flags = reinterpret_cast<uint32_t*>(p.memory);
  Deadline deadline(&p.result->status);
  const Time begin = now();
  for (int round = 0; round < p.rounds; ++round) {
    if (thread_index() == 0) flag_set(&flags[block_index()], round + 1);
    for (int i = lane_index(); i < p.blocks; i += kWarp) flag_wait(&flags[i], round + 1, deadline);
    sync_warp();
  }
  finish(p, begin, 0);
}

// The step of a grid exchange: every block writes its part of p.count bytes and reads all of them.
FUSEDRNN_MEASUREMENT(grid_gather) {
  auto* flags = reinterpret_cast<uint32_t*>(p.memory);
  const int part = p.count / p.blocks, begins = thread_index() * static_cast<int>(sizeof(Vector8));
  const int stride = threads_of_block() * static_cast<int>(sizeof(Vector8));
  uint32_t sum = 0;
  Deadline deadline(&p.result->status);
  const Time begin = now();
  for (int round = 0; round < p.rounds; ++round) {
    char* buffer = p.memory + kFlagBytes + (round & 1) * p.count;
    for (int i = begins; i < part; i += stride)
      *reinterpret_cast<Vector8*>(buffer + block_index() * part + i) = {{sum, sum}};
    sync_block();
    if (thread_index() == 0) flag_set(&flags[block_index()], round + 1);
    for (int i = lane_index(); i < p.blocks; i += kWarp) flag_wait(&flags[i], round + 1, deadline);
    sync_warp();
#pragma unroll 8
    for (int i = begins; i < p.count; i += stride) {
      const Vector8 v = load_fresh(buffer + i);
      sum ^= v.words[0] ^ v.words[1];
    }
  }
  finish(p, begin, sum);
}

FUSEDRNN_MEASUREMENT(cluster_barriers) {
  const Time begin = now();
  for (int round = 0; round < p.rounds; ++round) sync_cluster();
  finish(p, begin, 0);
}

FUSEDRNN_MEASUREMENT(block_barriers) {
  const Time begin = now();
  for (int round = 0; round < p.rounds; ++round) sync_block();
  finish(p, begin, 0);
}

template <int kChains>
FUSEDRNN_MEASUREMENT(products) {
  const uint32_t x = 0x3f803f80u + lane_index();
  float sums[kChains][4] = {};
  const Time begin = now();
  for (int round = 0; round < p.rounds; ++round)
#pragma unroll
    for (auto& sum : sums) mma_bf16(sum, {{x, x, x, x}}, {{x, x}});
  float total = 0;
  for (const auto& sum : sums) total += sum[0] + sum[1] + sum[2] + sum[3];
  finish(p, begin, __float_as_uint(total));
}

FUSEDRNN_MEASUREMENT(read_shared) {
  uint32_t sum = 0;
  const Time begin = now();
  for (int round = 0; round < p.rounds; ++round) {
    const char* from = shared_memory() + opaque(thread_index()) * sizeof(Vector16);
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const auto v = *reinterpret_cast<const Vector16*>(from + i * kThreads * sizeof(Vector16));
      sum ^= v.words[0] ^ v.words[1] ^ v.words[2] ^ v.words[3];
    }
  }
  finish(p, begin, sum);
}

// All blocks read the same bytes in the same order, as those of a group read its operand.
FUSEDRNN_MEASUREMENT(read_l2) {
  uint32_t sum = 0;
  const Time begin = now();
  for (int round = 0; round < p.rounds; ++round) {
    Vector8 v[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int vector = (round * kUnroll + i) * kThreads + thread_index();
      v[i] = load_fresh(p.memory + vector % (kMemoryBytes / sizeof(Vector8)) * sizeof(Vector8));
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) sum ^= v[i].words[0] ^ v[i].words[1];
  }
  finish(p, begin, sum);
}

struct Measurement {
  std::string name;
  Kernel kernel;
  LaunchShape shape;
  int rounds, count;
  double operations, bytes;  // of a round: one of the two
};

std::vector<Measurement> measurements() {
  constexpr int kRounds = 4096;
  constexpr int64_t kReadBytes = kUnroll * kThreads * int64_t{sizeof(Vector16)};
  const GpuDevice device = device_limits();
  // As much shared memory as a block can have: no two of them share a multiprocessor.
  const auto spread = [&](int64_t blocks, int threads, bool cooperative) {
    return LaunchShape{blocks, threads, device.shared_bytes, 1, cooperative};
  };
  const auto cluster = [&](int blocks, int threads) {
    return LaunchShape{blocks, threads, device.shared_bytes, blocks, false};
  };
  std::vector<Measurement> all{
      {"shared load", chase_shared, spread(1, kWarp, false), 4 * kRounds, 0, 1, 0},
      {"L2 load", chase_l2, spread(1, kWarp, false), 2 * kRounds, kMemoryBytes / kLine, 1, 0},
      {"L2 load, one line", chase_l2, spread(1, kWarp, false), kRounds, 1, 1, 0},
      {"product, after the one before", products<1>, spread(1, kWarp, false), 4 * kRounds, 0, 1, 0},
      {"product, 4 warps", products<8>, spread(1, 4 * kWarp, false), kRounds, 0, 8, 0},
      {"product, 8 warps", products<8>, spread(1, kThreads, false), kRounds, 0, 16, 0},
      {"sync_block, 8 warps", block_barriers, spread(1, kThreads, false), 4 * kRounds, 0, 1, 0},
      {"shared read", read_shared, spread(1, kThreads, false), kRounds, 0, 0, kReadBytes},
      {"L2 read, 1 block", read_l2, spread(1, kThreads, false), kRounds, 0, 0, kReadBytes / 2},
      {"L2 read, all blocks", read_l2, spread(device.multiprocessors, kThreads, false), kRounds, 0, 0,
       kReadBytes / 2},
      {"flag, 2 blocks in turn", flag_ping_pong, spread(2, kWarp, true), kRounds, 0, 1, 0},
  };
  for (int blocks : {2, 8, 32, device.multiprocessors})
    all.push_back(
        {"flags of " + (blocks == device.multiprocessors ? "all" : std::to_string(blocks)) + " blocks",
         flag_gather, spread(blocks, kWarp, true), kRounds, 0, 1, 0});
  all.push_back({"flags of all blocks, read by 8 warps of each", flag_gather,
                 spread(device.multiprocessors, kThreads, true), kRounds, 0, 1, 0});
  for (int blocks : {8, 16, 32, 64})
    if (blocks <= device.multiprocessors)
      all.push_back({"exchange of 16 KiB, " + std::to_string(blocks) + " blocks of a grid", grid_gather,
                     spread(blocks, kThreads, true), kRounds, 16 << 10, 1, 0});
  for (int blocks : {2, 4, 8, 16}) {
    const std::string of = ", cluster of " + std::to_string(blocks);
    const auto gather = [&](const char* name, int count, bool rate) {
      const int64_t bytes = int64_t{count} * blocks * sizeof(Vector16);
      const int threads = std::min(kThreads, std::max(kWarp, count * blocks));
      all.push_back({name + of, cluster_gather, cluster(blocks, threads), kRounds, count, rate ? 0.0 : 1.0,
                     rate ? static_cast<double>(bytes) : 0.0});
    };
    all.push_back({"remote load" + of, chase_remote, cluster(blocks, kWarp), 2 * kRounds, 0, 1, 0});
    all.push_back(
        {"remote store, 2 blocks in turn" + of, cluster_ping_pong, cluster(blocks, kWarp), kRounds, 0, 1, 0});
    all.push_back(
        {"sync_cluster, 8 warps" + of, cluster_barriers, cluster(blocks, kThreads), kRounds, 0, 1, 0});
    gather("exchange of 16 B from each", 1, false);
    gather("exchange of 16 KiB", 1024 / blocks, false);
    gather("exchange rate at 64 KiB", 4096 / blocks, true);
    all.push_back({"L2 multicast of 64 KiB" + of, cluster_multicast, cluster(blocks, kWarp), kRounds,
                   64 << 10, 0, 64 << 10});
  }
  return all;
}

void measure(const Measurement& what, int sample, double (&result)[4]) {
  if (!fits(what.kernel, what.shape)) throw std::runtime_error("this device cannot keep its blocks resident");
  char* allocated = nullptr;
  check_cuda(cudaMalloc(&allocated, 2 * kMemoryBytes), "cudaMalloc");
  const std::unique_ptr<char, void (*)(char*)> memory(allocated, [](char* p) { cudaFree(p); });
  check_cuda(cudaMemset(memory.get(), 0, 2 * kMemoryBytes), "cudaMemset");
  // Other lines for each sample: how far a line is depends on its address.
  const int line = sample * 37 % (kMemoryBytes / kLine);
  auto* result_there = reinterpret_cast<Result*>(memory.get() + 2 * kMemoryBytes - sizeof(Result));
  launch(what.kernel,
         {what.rounds, static_cast<int>(what.shape.blocks), what.count, result_there,
          memory.get() + line * kLine},
         what.shape, nullptr);
  Result found{};
  check_cuda(cudaMemcpy(&found, result_there, sizeof found, cudaMemcpyDeviceToHost), what.name.c_str());
  if (found.status != 0) throw std::runtime_error("a block waited for a peer that never came");
  result[0] = what.operations * what.rounds;
  result[1] = what.bytes * what.rounds;
  result[2] = static_cast<double>(found.cycles);
  result[3] = static_cast<double>(found.nanoseconds);
}

std::string plans(CellId cell, Number number, bool tf32, bool backward, int64_t N, int64_t B, int64_t H) try {
  constexpr const char* kExchanges[] = {"block", "cluster", "grid"};
  std::string lines;
  for (const auto& plan :
       plan_persistent({pass_of(cell, number, tf32, backward), N, B, H}, device_limits())) {
    if (!resident(plan, backward, cell, number, tf32)) continue;
    lines += kExchanges[static_cast<int>(plan.exchange)];
    for (int figure : {plan.slices, plan.unit_tiles, plan.k_splits, plan.batch_tiles, plan.groups})
      lines.append(1, ' ').append(std::to_string(figure));
    lines += '\n';
  }
  return lines;
} catch (const std::exception&) {
  return "";  // such a pass has no persistent kernel
}

}  // namespace
}  // namespace fusedrnn::cuda

#define FUSEDRNN_EXPORT extern "C" __attribute__((visibility("default")))

// The name of a measurement on the current device; null past the last. Valid until the thread's next call.
FUSEDRNN_EXPORT const char* fusedrnn_cuda_measurement(int index) try {
  thread_local std::string name;
  const auto all = fusedrnn::cuda::measurements();
  if (index < 0 || index >= static_cast<int>(all.size())) return nullptr;
  name = all[index].name;
  return name.c_str();
} catch (const std::exception&) {
  return nullptr;
}

// Runs one measurement. result: operations (0 if it is a rate), bytes (0 if it is not), cycles, nanoseconds.
// Null, or why there is no result, valid until the thread's next call.
FUSEDRNN_EXPORT const char* fusedrnn_cuda_measure(int index, int sample, double* result) try {
  fusedrnn::cuda::measure(fusedrnn::cuda::measurements().at(index), sample,
                          *reinterpret_cast<double (*)[4]>(result));
  return nullptr;
} catch (const std::exception& error) {
  thread_local std::string message;
  message = error.what();
  return message.c_str();
}

// How many clusters of so many blocks, each with a multiprocessor to itself, the current device has at once.
FUSEDRNN_EXPORT int fusedrnn_cuda_clusters(int blocks) try {
  return fusedrnn::cuda::device_limits().clusters_of(blocks);
} catch (const std::exception&) {
  return 0;
}

// The plans that the current device can keep resident, the one it would take first: a line each of exchange,
// slices, unit_tiles, k_splits, batch_tiles and groups. number: 0 bf16, 1 fp16, 2 fp32. Valid until the
// thread's next call.
FUSEDRNN_EXPORT const char* fusedrnn_cuda_plans(int cell, int number, bool tf32, bool backward, int64_t N,
                                                int64_t B, int64_t H) {
  thread_local std::string lines;
  lines = fusedrnn::cuda::plans(static_cast<fusedrnn::CellId>(cell),
                                static_cast<fusedrnn::cuda::Number>(number), tf32, backward, N, B, H);
  return lines.c_str();
}
