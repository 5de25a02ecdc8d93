// Runs CUDA kernels on a CPU: every thread of a launch is a fiber, all fibers of what must be co-resident are
// alive at once, and each operation of cuda/primitives is a point where another fiber may go on.
//
// Kernels include this through cuda/primitives only. It is built in three flavours: plain (tests of numerics,
// and a backend), with ThreadSanitizer (races: only what orders memory on a GPU makes an edge) and with
// AddressSanitizer (bounds).
#pragma once

#include <cstdint>
#include <functional>
#include <source_location>
#include <string>
#include <vector>

namespace fusedrnn::emulator {

// Where in a kernel an operation stands.
using Site = std::source_location;

enum class Format { kBFloat16, kHalf, kTf32 };

// What a running kernel asks of its device.

int thread_index();
int64_t block_index();
int threads_of_block();
char* shared_memory();
int cluster_rank();

void sync_block(Site site);
void sync_warp(Site site);
void sync_cluster(Site site);
void meet_cluster(Site site);  // as sync_cluster, but orders nothing

void copy_async(void* shared, const void* global);  // 4 bytes
void copy_async_wait(Site site);

void mma(Format format, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

void mbarrier_init(uint64_t* barrier, int arrivals, Site site);
void fence_mbarrier_init(Site site);
void mbarrier_expect(uint64_t* barrier, int bytes, Site site);
bool mbarrier_wait(uint64_t* barrier, uint32_t parity, Site site);  // false: nothing can ever end the wait
void remote_store(void* mine, int rank, const uint32_t (&words)[4], uint64_t* barrier, Site site);
void outlast_remote_stores(Site site);

void flag_set(uint32_t* flag, uint32_t value, Site site);
bool flag_wait(const uint32_t* flag, uint32_t value, Site site);

// What a test asks of the emulator.

enum class Order { kRoundRobin, kRandom, kStarvedBlock, kStarvedWarp };

struct Options {
  uint64_t seed = 0;
  Order order = Order::kRoundRobin;
  std::string without;     // "file.h:line": the operation there does nothing
  bool weakened = false;   // ... does everything but order memory, if there is anything else
  bool impatient = false;  // patience ends at any time: that of a thread, or of all threads of a block
};
void configure(const Options& options);

struct Shape {
  int64_t blocks;
  int threads;
  int64_t shared_bytes;
  int cluster;       // blocks of a cluster; 1: none
  bool cooperative;  // all blocks are co-resident
};

// Runs a kernel to its end. Throws std::runtime_error if it breaks a rule of the device: a barrier that not
// all threads reach, a block that is gone when a peer stores to it, a store outside its guards, ...
void launch(const Shape& shape, const std::function<void()>& kernel);

// An operation that orders memory, at a place in a kernel: "file.h:line".
struct Operation {
  std::string site, name;
  bool weakens;  // it does something beside
};

// Those that were run since the process began.
std::vector<Operation> sites();

// Waits that were given up because nothing could end them, since the last call: one sentence each.
std::vector<std::string> take_expired();

}  // namespace fusedrnn::emulator
