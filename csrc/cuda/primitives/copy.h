// Copies that a thread does not wait for, and loads of what another block has just written.
#pragma once

#include "thread.h"

namespace fusedrnn::device {

struct alignas(8) Vector8 {
  uint32_t words[2];
};
struct alignas(16) Vector16 {
  uint32_t words[4];
};

#if defined(__CUDACC__)

// Copies 4 bytes; they land some time before this thread's next copy_async_wait returns.
FUSEDRNN_DEVICE void copy_async(void* shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(shared)), "l"(global)
               : "memory");
}

FUSEDRNN_DEVICE void copy_async_wait() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Loads 8 bytes that another block wrote in this launch: from L2, never from a line this processor holds.
FUSEDRNN_DEVICE Vector8 load_fresh(const void* global) {
  Vector8 v;
  asm volatile("ld.relaxed.gpu.global.v2.b32 {%0, %1}, [%2];"
               : "=r"(v.words[0]), "=r"(v.words[1])
               : "l"(global));
  return v;
}

#else

inline void copy_async(void* shared, const void* global) { emulator::copy_async(shared, global); }
inline void copy_async_wait(Site site = Site::current()) { emulator::copy_async_wait(site); }
inline Vector8 load_fresh(const void* global) { return *static_cast<const Vector8*>(global); }

#endif

}  // namespace fusedrnn::device
