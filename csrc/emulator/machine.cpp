#include "machine.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <map>
#include <new>
#include <tuple>
#include <utility>

#include "sites.h"

namespace fusedrnn::emulator {

Launch* launched = nullptr;
Thread* current = nullptr;
std::vector<std::string> expired;

namespace {

constexpr int kResidentClusters = kRaceChecked ? 2 : 4;  // of a launch that needs no more at once
constexpr int64_t kGuardBytes = 1024;
constexpr char kUnwritten = '\xff';  // a NaN in every format
constexpr char kGuard = '\xa5';

// Taken from the first on by every launch, and never given back.
std::vector<std::unique_ptr<Thread>>& pool = *new std::vector<std::unique_ptr<Thread>>;

}  // namespace

std::string place() {
  if (!current) return "";
  std::ostringstream out;
  out << "block " << current->block->index << ", thread " << current->index << ": ";
  return out.str();
}

void Queue::push(Thread* thread) {
  thread->next = nullptr;
  (first_ ? last_->next : first_) = thread;
  last_ = thread;
}

Thread* Queue::pop() {
  Thread* thread = first_;
  if (thread) first_ = thread->next;
  return thread;
}

void Ready::reserve(size_t threads) {
  ring_.resize(std::bit_ceil(threads));
  mask_ = ring_.size() - 1;
}

Thread* Ready::take(size_t i) {
  std::swap(ring_[first_], ring_[(first_ + i) & mask_]);
  Thread* thread = ring_[first_];
  first_ = (first_ + 1) & mask_;
  --size_;
  return thread;
}

Launch::Launch(const Shape& shape, const Options& options, const std::function<void()>& kernel)
    : shape_(shape),
      order_(options.order),
      impatient_(options.impatient),
      kernel_(kernel),
      host_(Fiber::host()),
      state_(0x9e3779b97f4a7c15 * (2 * options.seed + 1)) {
  if (shape.threads < 1 || shape.threads > kMaxThreads || shape.cluster < 1 || shape.cluster > kMaxCluster ||
      shape.blocks < 1 || shape.blocks % shape.cluster || shape.shared_bytes < 0 ||
      shape.shared_bytes > kMaxSharedBytes)
    fail("no device can launch ", shape.blocks, " blocks of ", shape.threads, " threads and ",
         shape.shared_bytes, " bytes of shared memory in clusters of ", shape.cluster);
  copies_ = kRaceChecked ? 0 : 4 * random(2);
  constexpr uint64_t kDeliveries[] = {0, 2, 16};
  deliveries_ = kDeliveries[random(3)];

  const int64_t all = shape.blocks / shape.cluster;
  const int64_t resident = shape.cooperative ? all : std::min<int64_t>(all, kResidentClusters);
  for (int64_t i = 0; i < all; ++i) to_come_.push_back(all - 1 - i);
  if (order_ != Order::kRoundRobin)
    for (int64_t i = all; i > 1; --i) std::swap(to_come_[i - 1], to_come_[random(i)]);

  const int64_t members = int64_t{shape.cluster} * shape.threads;
  const int64_t warps = (shape.threads + kWarp - 1) / kWarp;
  const int64_t starved_block = random(resident * shape.cluster), starved_warp = random(warps);
  while (std::ssize(pool) < resident * members) pool.push_back(std::make_unique<Thread>());
  for (Ready& ready : ready_) ready.reserve(resident * members);
  clusters_.resize(resident);
  for (int64_t i = 0; i < resident; ++i) {
    Cluster& cluster = clusters_[i];
    cluster.blocks.resize(shape.cluster);
    for (int64_t t = 0; t < members; ++t) {
      Thread* thread = pool[i * members + t].get();
      thread->index = static_cast<int>(t % shape.threads);
      thread->block = &cluster.blocks[t / shape.threads];
      const bool block = i * shape.cluster + t / shape.threads == starved_block;
      thread->starved = block && (order_ == Order::kStarvedBlock ||
                                  (order_ == Order::kStarvedWarp && thread->index / kWarp == starved_warp));
      cluster.threads.push_back(thread);
    }
    ended_.push_back(&cluster);
  }
}

uint64_t Launch::random(uint64_t below) {  // xorshift64*
  state_ ^= state_ >> 12;
  state_ ^= state_ << 25;
  state_ ^= state_ >> 27;
  return (state_ * 0x2545f4914f6cdd1d >> 32) * below >> 32;
}

void Launch::begin(Cluster& cluster, int64_t index) {
  cluster.barrier = {.members = static_cast<int>(cluster.threads.size())};
  for (int rank = 0; rank < shape_.cluster; ++rank) {
    Block& block = cluster.blocks[rank];
    block.index = index * shape_.cluster + rank;
    block.rank = rank;
    block.cluster = &cluster;
    const int64_t bytes = (2 * kGuardBytes + shape_.shared_bytes + 127) / 128 * 128;
    block.memory.reset(static_cast<char*>(std::aligned_alloc(128, bytes)));
    if (!block.memory) throw std::bad_alloc();
    block.shared = block.memory.get() + kGuardBytes;
    std::memset(block.memory.get(), kGuard, bytes);
    std::memset(block.shared, kUnwritten, shape_.shared_bytes);
    forbid(block.memory.get(), kGuardBytes);
    forbid(block.shared + shape_.shared_bytes, kGuardBytes);
    block.barrier = {.members = shape_.threads};
    block.warps.clear();
    for (int rest = shape_.threads; rest > 0; rest -= kWarp)
      block.warps.push_back({.barrier = {.members = std::min(kWarp, rest)}, .product = {}});
    block.mbarriers.clear();
    block.impatient = false;
  }
  race::release(&cluster.begin);
  for (Thread* thread : cluster.threads) {
    thread->running = true;
    thread->given_up = false;
    thread->copies.clear();
    thread->wait = {};
    thread->fiber.start(&Launch::enter);
    ready(thread);
  }
}

void Launch::run() {
  launched = this;
  try {
    while (!failure_) {
      for (Cluster* cluster : ended_) {
        race::acquire(&cluster->end);
        for (const Block& block : cluster->blocks) check_guards(block);
        if (to_come_.empty()) continue;
        begin(*cluster, to_come_.back());
        to_come_.pop_back();
      }
      ended_.clear();
      if (std::all_of(clusters_.begin(), clusters_.end(), [](const Cluster& c) { return c.ended(); })) return;
      if (Thread* thread = next())
        switch_to(thread);
      else if (!stores_.empty())
        deliver_one();
      else
        resolve_deadlock();
    }
  } catch (...) {
    failure_ = std::current_exception();
  }
  // Threads that have not ended never will. What they did comes before what the host does next.
  for (Cluster& cluster : clusters_) {
    for (Thread* thread : cluster.threads)
      if (std::exchange(thread->running, false)) thread->fiber.abandon(&cluster.end);
    race::acquire(&cluster.end);
  }
  std::rethrow_exception(failure_);
}

void Launch::check_guards(const Block& block) const {
  if (kBoundsChecked || !block.memory) return;
  const auto whole = [](const char* guard) {
    return std::all_of(guard, guard + kGuardBytes, [](char c) { return c == kGuard; });
  };
  if (!whole(block.memory.get())) fail("block ", block.index, " wrote before its shared memory");
  if (!whole(block.shared + shape_.shared_bytes))
    fail("block ", block.index, " wrote past its shared memory");
}

void Launch::enter() {
  Launch& launch = *launched;
  Thread* self = current;
  Thread* next = nullptr;
  race::acquire(&self->block->cluster->begin);
  try {
    launch.kernel_();
    launch.end_thread();
    next = launch.next();
  } catch (...) {
    launch.failure_ = std::current_exception();
  }
  self->running = false;
  race::release(&self->block->cluster->end);
  current = next;
  self->fiber.end_in(next ? next->fiber : launch.host_);
}

void Launch::end_thread() {
  Block& block = *current->block;
  Cluster& cluster = *block.cluster;
  Warp& warp = current->warp();
  for (Barrier* barrier : {&warp.barrier, &block.barrier, &cluster.barrier}) {
    ++barrier->ended;
    if (barrier->arrived)
      fail("ended while ", barrier->arrived, " of ", barrier->members, " threads are in ",
           name(barrier->operation, barrier->site));
  }
  if (warp.product.arrived) fail("ended while ", warp.product.arrived, " lanes of its warp are in a product");
  if (block.ended())
    for (const RemoteStore& store : stores_)
      if (store.block == &block) fail("its block ended while a remote store to it was under way");
  if (cluster.ended()) ended_.push_back(&cluster);
}

// Null: the host has something to do.
Thread* Launch::next() {
  if (!stores_.empty() && deliveries_ && random(deliveries_) == 0) deliver_one();
  if (!ended_.empty()) return nullptr;
  for (Ready& ready : ready_)
    if (ready.size()) return ready.take(order_ == Order::kRoundRobin ? 0 : random(ready.size()));
  return nullptr;
}

void Launch::switch_to(Thread* thread) {
  Thread* self = current;
  if (thread == self) return;
  current = thread;
  (self ? self->fiber : host_).switch_to(thread ? thread->fiber : host_);
}

void Launch::give_way() {
  land_copy();
  ready(current);
  switch_to(next());
}

void Launch::wait(Queue& queue) {
  land_copy();
  queue.push(current);
  switch_to(next());
}

void Launch::wake(Queue& queue) {
  while (Thread* thread = queue.pop()) ready(thread);
}

bool Launch::wait_until(Queue& queue, const Wait& wait, const std::function<bool()>& done) {
  Thread& self = *current;
  give_way();
  while (!done()) {
    if (impatient_ && loses_patience(queue)) return false;
    self.wait = wait;
    this->wait(queue);
    self.wait.operation = nullptr;
    if (std::exchange(self.given_up, false)) return false;
  }
  return true;
}

bool Launch::loses_patience(Queue& queue) {
  Block& block = *current->block;
  if (random(64) == 0) {
    block.impatient = true;
    wake(queue);
  }
  return block.impatient || random(32) == 0;
}

void Launch::arrive(Barrier& barrier, const char* operation, const Site& site, Orders orders) {
  const Mode mode = orders == Orders::kMemory   ? visit(operation, site)
                    : left_out(operation, site) ? Mode::kLeftOut
                                                : Mode::kWeakened;
  if (mode == Mode::kLeftOut) return;
  if (barrier.ended)
    fail(name(operation, site), ", which ", barrier.ended, " of ", barrier.members,
         " threads will never reach: they have ended");
  if (barrier.arrived && !same(barrier.site, site))
    fail(name(operation, site), " while ", barrier.arrived, " of ", barrier.members, " threads are in ",
         name(operation, barrier.site));
  barrier.operation = operation;
  barrier.site = site;
  char* edge = &barrier.edges[barrier.phase & 1];
  if (mode == Mode::kWhole) race::release(edge);
  if (++barrier.arrived < barrier.members) {
    wait(barrier.waiting);
  } else {
    barrier.arrived = 0;
    ++barrier.phase;
    Cluster& cluster = *current->block->cluster;
    if (mode == Mode::kWhole && &barrier == &cluster.barrier)
      for (Block& block : cluster.blocks)
        for (Mbarrier& mbarrier : block.mbarriers) mbarrier.published |= mbarrier.fenced;
    wake(barrier.waiting);
    give_way();
  }
  if (mode == Mode::kWhole) race::acquire(edge);
}

void Launch::land_copy() {
  std::vector<Copy>& copies = current->copies;
  if (copies.empty() || !copies_ || random(copies_)) return;
  std::swap(copies[random(copies.size())], copies.back());
  *copies.back().target = *copies.back().source;
  copies.pop_back();
}

void Launch::store(const RemoteStore& store) {
  if (kRaceChecked)
    deliver(store);
  else
    stores_.push_back(store);
}

void Launch::deliver_one() {
  std::swap(stores_[random(stores_.size())], stores_.back());
  const RemoteStore store = stores_.back();
  stores_.pop_back();
  deliver(store);
}

void Launch::deliver_all_to(const Block& block) {
  for (size_t i = 0; i < stores_.size();)
    if (stores_[i].block == &block) {
      const RemoteStore store = stores_[i];
      stores_[i] = stores_.back();
      stores_.pop_back();
      deliver(store);
    } else {
      ++i;
    }
}

void Launch::deliver(const RemoteStore& store) {
  *reinterpret_cast<std::array<uint32_t, 4>*>(store.target) = store.words;
  store.barrier->bytes -= sizeof(store.words);
  if (store.barrier->bytes < -kMaxPendingBytes)
    fail("more remote stores to block ", store.block->index, " than its mbarrier was told to expect");
  advance(*store.barrier);
}

void advance(Mbarrier& barrier) {
  if (barrier.pending || barrier.bytes) return;
  ++barrier.phase;
  barrier.pending = barrier.arrivals;
  launched->wake(barrier.waiting);
}

void Launch::resolve_deadlock() {
  if (!give_up_waits()) fail("deadlock:", unmet_barriers());
}

// Of all threads, for nothing can run. Says in `expired` what was waited for.
bool Launch::give_up_waits() {
  std::map<std::tuple<std::string, int64_t>, std::pair<const Thread*, int>> waits;  // the first, how many
  for (const Cluster& cluster : clusters_)
    for (Thread* thread : cluster.threads)
      if (thread->wait.operation) {
        thread->given_up = true;
        auto& [first, number] =
            waits[{name(thread->wait.operation, thread->wait.site), thread->block->index}];
        if (!number++) first = thread;
      }
  for (const auto& [key, value] : waits) {
    const auto& [where, block] = key;
    const auto& [thread, number] = value;
    const Wait& wait = thread->wait;
    std::ostringstream out;
    out << where << " was given up in block " << block << " by thread " << thread->index;
    if (number > 1) out << " and " << number - 1 << " more";
    if (wait.flag)
      out << ": the flag is " << *wait.flag << ", not " << wait.wanted;
    else
      out << ": phase " << wait.mbarrier->phase << " of the mbarrier at byte "
          << reinterpret_cast<char*>(wait.mbarrier->address) - thread->block->shared << " lacks "
          << wait.mbarrier->pending << " arrivals and " << wait.mbarrier->bytes << " bytes";
    expired.push_back(out.str());
  }
  for (Queue& queue : flag_queues_) wake(queue);
  for (Cluster& cluster : clusters_)
    for (Block& block : cluster.blocks)
      for (Mbarrier& mbarrier : block.mbarriers) wake(mbarrier.waiting);
  return !waits.empty();
}

std::string Launch::unmet_barriers() const {
  std::ostringstream out;
  const auto add = [&](const Barrier& barrier, const char* scope, int64_t index) {
    if (barrier.arrived)
      out << ' ' << name(barrier.operation, barrier.site) << " has " << barrier.arrived << " of "
          << barrier.members << " threads of " << scope << ' ' << index << ';';
  };
  for (const Cluster& cluster : clusters_) {
    add(cluster.barrier, "the cluster of block", cluster.blocks[0].index);
    for (const Block& block : cluster.blocks) {
      add(block.barrier, "block", block.index);
      for (const Warp& warp : block.warps) {
        add(warp.barrier, "a warp of block", block.index);
        if (warp.product.arrived)
          out << " a product has " << warp.product.arrived << " lanes of a warp of block " << block.index
              << ';';
      }
    }
  }
  return out.str();
}

}  // namespace fusedrnn::emulator
