// The emulated machine: blocks of fibers, their shared memory and barriers, and the order in which they run.
//
// A thread gives way at every operation that orders memory; in between it runs alone. One that waits stands
// in the queue of what it waits for. Where an operation has a freedom on a GPU, it has it here: a copy lands
// at any time before its wait returns, a remote store at any time after its issue (but both as late or as
// early as can be under ThreadSanitizer, which finds a race in whichever order the accesses happen).
//
// No memory is freed or grown by one thread that another took: ThreadSanitizer would see a race in that.
#pragma once

#include <array>
#include <cstdlib>
#include <exception>
#include <forward_list>
#include <functional>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "fibers.h"
#include "runtime.h"
#include "tensor_core.h"

namespace fusedrnn::emulator {

inline constexpr int kWarp = 32, kMaxThreads = 1024, kMaxCluster = 16;
inline constexpr int64_t kMaxSharedBytes = 227 << 10;
inline constexpr int kMaxPendingBytes = (1 << 20) - 1;  // of an mbarrier, in either direction

struct Block;
struct Cluster;
struct Mbarrier;
struct Thread;

enum class Orders { kMemory, kNothing };  // what a barrier does beside holding up threads

// Threads that wait, linked through themselves.
class Queue {
 public:
  void push(Thread* thread);
  Thread* pop();

 private:
  Thread *first_ = nullptr, *last_ = nullptr;
};

// A barrier of all threads of a warp, a block or a cluster.
struct Barrier {
  int members = 0, arrived = 0, ended = 0;
  uint32_t phase = 0;
  const char* operation = nullptr;  // of the first to arrive, and its site
  Site site{};
  Queue waiting{};
  char edges[2]{};  // of even and odd phases: who leaves late may meet who is early for the next
};

struct Product {
  int arrived = 0;
  Format format{};
  Fragments lanes[kWarp]{};
  Queue waiting{};
};

struct Warp {
  Barrier barrier;
  Product product;
};

struct Mbarrier {
  uint64_t* address;
  Thread* creator;
  int arrivals, pending;
  bool fenced = false, published = false;
  int bytes = 0;  // to come
  uint32_t phase = 0;
  Queue waiting{};
  char edges[2]{};
};

struct Block {
  int64_t index;
  int rank;
  Cluster* cluster;
  std::unique_ptr<char, decltype(&std::free)> memory{nullptr, &std::free};  // guard, shared, guard
  char* shared;
  Barrier barrier;
  std::vector<Warp> warps;
  std::forward_list<Mbarrier> mbarriers;
  bool impatient = false;  // none of its threads waits any longer

  bool ended() const { return barrier.ended == barrier.members; }
};

struct Cluster {
  std::vector<Block> blocks;
  std::vector<Thread*> threads;
  Barrier barrier;
  char begin, end;  // edges

  bool ended() const { return barrier.ended == barrier.members; }
};

struct Copy {
  uint32_t* target;
  const uint32_t* source;
};

struct RemoteStore {
  Block* block;
  Mbarrier* barrier;
  char* target;
  std::array<uint32_t, 4> words;
};

// What a thread waits for, if it can give up.
struct Wait {
  const char* operation = nullptr;
  Site site{};
  const Mbarrier* mbarrier = nullptr;
  const uint32_t* flag = nullptr;
  uint32_t wanted = 0;
};

struct Thread {
  Fiber fiber;
  int index = 0;
  Block* block = nullptr;
  bool running = false, starved = false, given_up = false;
  Thread* next = nullptr;  // in a queue
  std::vector<Copy> copies;
  Wait wait;

  Warp& warp() const { return block->warps[index / kWarp]; }
};

// Threads that can run.
class Ready {
 public:
  void reserve(size_t threads);
  size_t size() const { return size_; }
  void push(Thread* thread) { ring_[(first_ + size_++) & mask_] = thread; }
  Thread* take(size_t i);

 private:
  std::vector<Thread*> ring_;  // as long as a power of two
  size_t mask_ = 0, first_ = 0, size_ = 0;
};

class Launch {
 public:
  Launch(const Shape& shape, const Options& options, const std::function<void()>& kernel);
  void run();

  const Shape& shape() const { return shape_; }

  // What the running thread asks for.
  void give_way();          // it can go on at any time
  void wait(Queue& queue);  // it can go on once another has woken the queue
  bool wait_until(Queue& queue, const Wait& wait, const std::function<bool()>& done);  // false: given up
  void arrive(Barrier& barrier, const char* operation, const Site& site, Orders orders = Orders::kMemory);
  void store(const RemoteStore& store);
  void deliver_all_to(const Block& block);
  void wake(Queue& queue);
  Queue& waiting_for(const uint32_t* flag) {
    return flag_queues_[reinterpret_cast<uintptr_t>(flag) / 4 % flag_queues_.size()];
  }

 private:
  static void enter();
  void begin(Cluster& cluster, int64_t index);
  void check_guards(const Block& block) const;
  void end_thread();
  Thread* next();
  void switch_to(Thread* thread);
  uint64_t random(uint64_t below);
  void ready(Thread* thread) { ready_[thread->starved].push(thread); }
  bool loses_patience(Queue& queue);
  void land_copy();
  void deliver_one();
  void deliver(const RemoteStore& store);
  void resolve_deadlock();
  bool give_up_waits();
  std::string unmet_barriers() const;

  const Shape shape_;
  const Order order_;
  const bool impatient_;
  const std::function<void()>& kernel_;
  Fiber& host_;
  uint64_t state_;                   // of `random`
  uint64_t copies_, deliveries_;     // one of so many chances is taken; 0: none
  std::vector<Cluster> clusters_;    // resident
  std::vector<int64_t> to_come_;     // indices of clusters, the next one last
  std::vector<Cluster*> ended_;      // resident, to be replaced
  std::array<Ready, 2> ready_;       // the starved last
  std::vector<RemoteStore> stores_;  // under way
  std::array<Queue, 64> flag_queues_;
  std::exception_ptr failure_;
};

// There is one launch at a time.
extern Launch* launched;
extern Thread* current;  // null: the host runs
extern std::vector<std::string> expired;

// Completes the phase if nothing is lacking.
void advance(Mbarrier& barrier);

std::string place();  // of the running thread: "block 0, thread 1: "

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream out;
  out << place();
  (out << ... << parts);
  throw std::runtime_error(out.str());
}

}  // namespace fusedrnn::emulator
