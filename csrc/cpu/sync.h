// Steps of one recurrence shared by several workers, each with a slice of the hidden units.
#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>

#include "../plan.h"

namespace fusedrnn::FUSEDRNN_ISA {

// A worker takes its own slice of every step first, and then any slice that nobody has taken. So it never
// waits for work that no running thread has begun: a thread pool that runs the workers one after another, or
// fewer of them than asked for (a nested parallel region), finishes all the same.
class SliceSync {
 public:
  // Calls step(t, slice) for t in [0, T), each pair once; step t starts when all slices of t - 1 are done.
  template <class Step>
  void run(int64_t T, int64_t slices, int64_t own, const Step& step) {
    for (int64_t t = 0; t < T; ++t) {
      wait_for(t * slices);
      for (int64_t i = 0; i < slices; ++i) {
        const int64_t slice = (own + i) % slices;
        int64_t expected = t;
        if (next_[slice].step.compare_exchange_strong(expected, t + 1, std::memory_order_relaxed)) {
          step(t, slice);
          done_.fetch_add(1, std::memory_order_release);
        }
      }
    }
  }

 private:
  void wait_for(int64_t done) {
    for (int spins = 0; done_.load(std::memory_order_acquire) < done; ++spins) {
      if (spins < 2000)
        __builtin_ia32_pause();
      else
        sched_yield();  // more threads than cores: the one we wait for may need this core
    }
  }

  struct alignas(64) Next {
    std::atomic<int64_t> step{0};
  };
  alignas(64) std::atomic<int64_t> done_{0};
  Next next_[kMaxUnitSlices];
};

}  // namespace fusedrnn::FUSEDRNN_ISA
