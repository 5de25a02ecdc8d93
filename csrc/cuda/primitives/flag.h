// Flags in global memory by which the blocks of a grid tell each other that data is there.
#pragma once

#include "deadline.h"

namespace fusedrnn::device {

#if defined(__CUDACC__)

// What this thread wrote, and what it knows others to have written (through a barrier), comes with the flag.
FUSEDRNN_DEVICE void flag_set(uint32_t* flag, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

// Waits until the flag is `value` or more.
FUSEDRNN_DEVICE void flag_wait(const uint32_t* flag, uint32_t value, Deadline& deadline) {
  deadline.poll([&] {
    uint32_t now;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(flag) : "memory");
    return now >= value;
  });
}

#else

inline void flag_set(uint32_t* flag, uint32_t value, Site site = Site::current()) {
  emulator::flag_set(flag, value, site);
}
inline void flag_wait(const uint32_t* flag, uint32_t value, Deadline& deadline, Site site = Site::current()) {
  deadline.poll([&] { return emulator::flag_wait(flag, value, site); });
}

#endif

}  // namespace fusedrnn::device
