// The bound of every spin: a block whose peers never came must end, and say so.
#pragma once

#include "thread.h"

namespace fusedrnn::device {

// A thread's patience, over all its waits in a launch. Once it has run out, waits return at once: the kernel
// runs to its end without its peers, every barrier stays whole, and its results mean nothing.
class Deadline {
 public:
  // status: where the failure is left; any non-zero value of it means that the launch's results are void.
  FUSEDRNN_DEVICE explicit Deadline(uint32_t* status) : status_(status) {}
  FUSEDRNN_DEVICE bool expired() const { return expired_; }

  // Polls until `ready()` or too late.
  template <class Ready>
  FUSEDRNN_DEVICE void poll(Ready ready);

 private:
  FUSEDRNN_DEVICE void expire();
  uint32_t* status_;
  bool expired_ = false;
};

#if defined(__CUDACC__)

// Of a clock that all processors share.
FUSEDRNN_DEVICE int64_t nanoseconds() {
  int64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

template <class Ready>
FUSEDRNN_DEVICE void Deadline::poll(Ready ready) {
  constexpr uint32_t kPollsPerLook = 1024;
  constexpr int64_t kNanoseconds = 10'000'000'000;
  int64_t begin = 0;
  for (uint32_t polls = 1; !expired_ && !ready(); ++polls) {
    if (polls % kPollsPerLook) continue;
    const int64_t now = nanoseconds();
    if (!begin) begin = now;
    if (now - begin > kNanoseconds) expire();
  }
}

FUSEDRNN_DEVICE void Deadline::expire() {
  expired_ = true;
  asm volatile("st.relaxed.sys.global.u32 [%0], 1;" ::"l"(status_) : "memory");
}

#else

// The emulator waits itself, and gives up when nothing in the launch can move.
template <class Ready>
inline void Deadline::poll(Ready ready) {
  if (!expired_ && !ready()) expire();
}

inline void Deadline::expire() {
  expired_ = true;
  __atomic_store_n(status_, 1u, __ATOMIC_RELAXED);
}

#endif

}  // namespace fusedrnn::device
