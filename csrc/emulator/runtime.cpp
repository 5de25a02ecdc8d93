// What kernels ask of the emulated machine.
#include "runtime.h"

#include <mutex>
#include <utility>

#include "machine.h"
#include "sites.h"

namespace fusedrnn::emulator {

namespace {

std::mutex mutex;  // of all launches and their options
Options options;

constexpr uint64_t kMbarrierMark = 0x7265697272616221;  // what lies where an mbarrier is

// That `bytes` at `address` are in the block's own shared memory, and aligned to as many.
void check_own(const char* operation, const void* address, int64_t bytes) {
  const int64_t offset = static_cast<const char*>(address) - current->block->shared;
  if (offset < 0 || offset + bytes > launched->shape().shared_bytes || offset % bytes)
    fail(operation, " of ", bytes, " bytes at byte ", offset, " of ", launched->shape().shared_bytes,
         " of shared memory");
}

Mbarrier& find(Block& block, const uint64_t* address, const char* operation, const Site& site) {
  for (Mbarrier& barrier : block.mbarriers) {
    if (barrier.address != address) continue;
    if (*address != kMbarrierMark) fail(name(operation, site), ": the mbarrier was overwritten");
    if (!barrier.published && barrier.creator != current)
      fail(name(operation, site),
           ": the mbarrier's init need not be known here yet; a fence_mbarrier_init by "
           "the thread that ran it, then a sync_cluster, must come first");
    return barrier;
  }
  fail(name(operation, site), ": there is no mbarrier in block ", block.index);
}

// What the address of this block is in another of its cluster.
template <class T>
T* map_to(const Block& block, T* mine) {
  return reinterpret_cast<T*>(block.shared + (reinterpret_cast<char*>(mine) - current->block->shared));
}

}  // namespace

int thread_index() { return current->index; }
int64_t block_index() { return current->block->index; }
int threads_of_block() { return launched->shape().threads; }
char* shared_memory() { return current->block->shared; }
int cluster_rank() { return current->block->rank; }

void sync_block(Site site) { launched->arrive(current->block->barrier, "sync_block", site); }
void sync_warp(Site site) { launched->arrive(current->warp().barrier, "sync_warp", site); }
void sync_cluster(Site site) { launched->arrive(current->block->cluster->barrier, "sync_cluster", site); }
void meet_cluster(Site site) {
  launched->arrive(current->block->cluster->barrier, "meet_cluster", site, Orders::kNothing);
}

void copy_async(void* shared, const void* global) {
  check_own("copy_async", shared, 4);
  if (reinterpret_cast<uintptr_t>(global) % 4) fail("copy_async of 4 bytes that are not aligned");
  if (kBoundsChecked) static_cast<void>(*static_cast<const volatile uint32_t*>(global));
  // It may land from now on, and is known to have landed after the wait: both are accesses.
  race::reads(global, 4, __builtin_return_address(0));
  race::writes(shared, 4, __builtin_return_address(0));
  current->copies.push_back({static_cast<uint32_t*>(shared), static_cast<const uint32_t*>(global)});
}

void copy_async_wait(Site site) {
  // Without a copy under way it does nothing, and leaving it out would change nothing.
  if (!current->copies.empty() && left_out("copy_async_wait", site)) return;
  launched->give_way();
  for (const Copy& copy : current->copies) {
    race::reads(copy.source, 4, __builtin_return_address(0));
    race::writes(copy.target, 4, __builtin_return_address(0));
    *copy.target = *copy.source;
  }
  current->copies.clear();
}

void mma(Format format, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  Warp& warp = current->warp();
  Product& product = warp.product;
  if (const int lanes = warp.barrier.members - warp.barrier.ended; lanes < kWarp)
    fail("a product needs the ", kWarp, " lanes of a warp, of which ", lanes, " are there");
  if (product.arrived && product.format != format) fail("a product whose lanes differ in format");
  product.format = format;
  product.lanes[current->index % kWarp] = {a, b, d};
  if (++product.arrived < kWarp) return launched->wait(product.waiting);
  product.arrived = 0;
  multiply(format, product.lanes);
  launched->wake(product.waiting);
}

void mbarrier_init(uint64_t* barrier, int arrivals, Site site) {
  if (left_out("mbarrier_init", site)) return;
  check_own("mbarrier_init", barrier, 8);
  Block& block = *current->block;
  for (const Mbarrier& other : block.mbarriers)
    if (other.address == barrier) fail(name("mbarrier_init", site), ": there is an mbarrier already");
  *barrier = kMbarrierMark;
  block.mbarriers.push_front(
      {.address = barrier, .creator = current, .arrivals = arrivals, .pending = arrivals});
  launched->give_way();
}

void fence_mbarrier_init(Site site) {
  if (left_out("fence_mbarrier_init", site)) return;
  for (Mbarrier& barrier : current->block->mbarriers) barrier.fenced |= barrier.creator == current;
  launched->give_way();
}

void mbarrier_expect(uint64_t* address, int bytes, Site site) {
  if (left_out("mbarrier_expect", site)) return;
  Mbarrier& barrier = find(*current->block, address, "mbarrier_expect", site);
  if (!barrier.pending) fail(name("mbarrier_expect", site), ": one arrival more than the phase has");
  if (bytes < 0 || bytes > kMaxPendingBytes - barrier.bytes)
    fail(name("mbarrier_expect", site), ": ", bytes, " bytes, with ", barrier.bytes, " to come already");
  barrier.bytes += bytes;
  --barrier.pending;
  advance(barrier);
  launched->give_way();
}

bool mbarrier_wait(uint64_t* address, uint32_t parity, Site site) {
  const Mode mode = visit("mbarrier_wait", site);
  if (mode == Mode::kLeftOut) return true;
  Mbarrier& barrier = find(*current->block, address, "mbarrier_wait", site);
  // Looked at again after every wake-up: a thread that comes too late may have missed the phase.
  const bool done = launched->wait_until(barrier.waiting, {"mbarrier_wait", site, &barrier},
                                         [&] { return (barrier.phase ^ parity) & 1; });
  if (done && mode == Mode::kWhole) race::acquire(&barrier.edges[parity & 1]);
  return done;
}

void remote_store(void* mine, int rank, const uint32_t (&words)[4], uint64_t* barrier_of_mine, Site site) {
  const Mode mode = visit("remote_store", site);
  if (mode == Mode::kLeftOut) return;
  check_own("remote_store", mine, 16);
  check_own("mbarrier of a remote_store", barrier_of_mine, 8);
  std::vector<Block>& blocks = current->block->cluster->blocks;
  if (rank < 0 || rank >= std::ssize(blocks))
    fail(name("remote_store", site), " to rank ", rank, " of a cluster of ", blocks.size());
  Block& block = blocks[rank];
  if (block.ended()) fail(name("remote_store", site), " to block ", block.index, ", which has ended");
  char* target = map_to(block, static_cast<char*>(mine));
  Mbarrier& barrier = find(block, map_to(block, barrier_of_mine), "remote_store", site);
  race::writes(target, 16, __builtin_return_address(0));
  if (mode == Mode::kWhole) race::release(&barrier.edges[barrier.phase & 1]);
  launched->store({&block, &barrier, target, {words[0], words[1], words[2], words[3]}});
  launched->give_way();
}

void outlast_remote_stores(Site site) {
  if (left_out("outlast_remote_stores", site)) return;
  launched->deliver_all_to(*current->block);
  launched->give_way();
}

void flag_set(uint32_t* flag, uint32_t value, Site site) {
  const Mode mode = visit("flag_set", site);
  if (mode == Mode::kLeftOut) return;
  if (mode == Mode::kWhole) race::release(flag);
  *flag = value;
  launched->wake(launched->waiting_for(flag));
  launched->give_way();
}

bool flag_wait(const uint32_t* flag, uint32_t value, Site site) {
  const Mode mode = visit("flag_wait", site);
  if (mode == Mode::kLeftOut) return true;
  const bool done = launched->wait_until(
      launched->waiting_for(flag), {"flag_wait", site, nullptr, flag, value}, [&] { return *flag >= value; });
  if (done && mode == Mode::kWhole) race::acquire(const_cast<uint32_t*>(flag));
  return done;
}

void configure(const Options& wanted) {
  const std::lock_guard lock(mutex);
  options = wanted;
  choose(options);
}

void launch(const Shape& shape, const std::function<void()>& kernel) {
  const std::lock_guard lock(mutex);
  Launch(shape, options, kernel).run();
}

std::vector<Operation> sites() {
  const std::lock_guard lock(mutex);
  return visited();
}

std::vector<std::string> take_expired() {
  const std::lock_guard lock(mutex);
  return std::exchange(expired, {});
}

}  // namespace fusedrnn::emulator
