// Who a thread is, the shared memory of its block, and the barriers of a warp, a block and a cluster.
//
// Like every header of this folder: PTX for a GPU, and for a CPU the same operation on the emulator, in which
// what orders memory also carries the place of its call, so that a test can name it and leave it out.
#pragma once

#include "../../cells/cell.h"  // FUSEDRNN_HD

#if defined(__CUDACC__)
#define FUSEDRNN_DEVICE __device__ __forceinline__
#define FUSEDRNN_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define FUSEDRNN_PARAMS const __grid_constant__
#else
#include "../../emulator/runtime.h"
#define FUSEDRNN_DEVICE inline
#define FUSEDRNN_KERNEL(threads) void
#define FUSEDRNN_PARAMS const
#endif

#include <cstdint>

namespace fusedrnn::device {

#if defined(__CUDACC__)

FUSEDRNN_DEVICE int thread_index() { return threadIdx.x; }
FUSEDRNN_DEVICE int64_t block_index() { return blockIdx.x; }
FUSEDRNN_DEVICE int threads_of_block() { return blockDim.x; }

FUSEDRNN_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

FUSEDRNN_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

FUSEDRNN_DEVICE void sync_block() { asm volatile("bar.sync 0;" ::: "memory"); }
FUSEDRNN_DEVICE void sync_warp() { asm volatile("bar.warp.sync 0xffffffff;" ::: "memory"); }

#if __CUDA_ARCH__ >= 900
FUSEDRNN_DEVICE int cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
FUSEDRNN_DEVICE void sync_cluster() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n\t"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}
// Returns once all threads of the cluster have come here; orders nothing.
FUSEDRNN_DEVICE void meet_cluster() {
  asm volatile(
      "barrier.cluster.arrive.relaxed.aligned;\n\t"
      "barrier.cluster.wait.aligned;");
}
#else  // a plan without clusters is all that such a device gets
FUSEDRNN_DEVICE int cluster_rank() { return 0; }
FUSEDRNN_DEVICE void sync_cluster() { __trap(); }
FUSEDRNN_DEVICE void meet_cluster() { __trap(); }
#endif

#else

using emulator::Site;

inline int thread_index() { return emulator::thread_index(); }
inline int64_t block_index() { return emulator::block_index(); }
inline int threads_of_block() { return emulator::threads_of_block(); }
inline char* shared_memory() { return emulator::shared_memory(); }
inline int cluster_rank() { return emulator::cluster_rank(); }
inline void sync_block(Site site = Site::current()) { emulator::sync_block(site); }
inline void sync_warp(Site site = Site::current()) { emulator::sync_warp(site); }
inline void sync_cluster(Site site = Site::current()) { emulator::sync_cluster(site); }
inline void meet_cluster(Site site = Site::current()) { emulator::meet_cluster(site); }

#endif

// x, of which the compiler knows nothing: it cannot compute ahead, and keep in registers, what depends on it.
FUSEDRNN_DEVICE int opaque(int x) {
#if defined(__CUDACC__)
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// Likewise: it is computed here, not in the branches where it is needed.
FUSEDRNN_DEVICE float opaque(float x) {
#if defined(__CUDACC__)
  asm volatile("" : "+f"(x));
#endif
  return x;
}

template <class T>
FUSEDRNN_DEVICE T* opaque(T* p) {
#if defined(__CUDACC__)
  asm volatile("" : "+l"(p));
#endif
  return p;
}

FUSEDRNN_DEVICE int lane_index() { return thread_index() % 32; }
FUSEDRNN_DEVICE int warp_index() { return thread_index() / 32; }

}  // namespace fusedrnn::device
