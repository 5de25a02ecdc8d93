// Barriers in shared memory that count bytes, and stores to another block of the cluster that they count.
#pragma once

#include "copy.h"
#include "deadline.h"

namespace fusedrnn::device {

using Mbarrier = uint64_t;

#if defined(__CUDACC__)

// By one thread; then fence_mbarrier_init by the same, then sync_cluster by all.
FUSEDRNN_DEVICE void mbarrier_init(Mbarrier* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
               : "memory");
}

#if __CUDA_ARCH__ >= 900

FUSEDRNN_DEVICE void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and adds to the bytes that must come before the phase is complete.
FUSEDRNN_DEVICE void mbarrier_expect(Mbarrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

// Waits for the end of the phase of that parity; what the phase's stores wrote to this block's shared memory
// is then visible. Where a peer stored, PTX's memory model asks for an acquire of the cluster. The block's
// own shared memory, where both data and barrier lie, needs none, and all that one adds on sm_90 is to empty
// L1.
FUSEDRNN_DEVICE void mbarrier_wait(Mbarrier* barrier, uint32_t parity, Deadline& deadline) {
  const uint32_t address = shared_address(barrier);
  deadline.poll([&] {
    uint32_t done;
    asm volatile(
        "{\n\t.reg .pred p;\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(done)
        : "r"(address), "r"(parity)
        : "memory");
    return done != 0;
  });
}

// Stores 16 bytes at `mine`'s address in the shared memory of block `rank` of the cluster, and completes as
// many on the barrier at `barrier`'s address there.
FUSEDRNN_DEVICE void remote_store(void* mine, int rank, const Vector16& v, Mbarrier* barrier) {
  asm volatile(
      "{\n\t.reg .b32 data, counter;\n\t"
      "mapa.shared::cluster.u32 data, %0, %2;\n\t"
      "mapa.shared::cluster.u32 counter, %1, %2;\n\t"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [data], {%3, %4, %5, %6}, "
      "[counter];\n\t}" ::"r"(shared_address(mine)),
      "r"(shared_address(barrier)), "r"(rank), "r"(v.words[0]), "r"(v.words[1]), "r"(v.words[2]),
      "r"(v.words[3])
      : "memory");
}

// Stays until what peers have stored here must have landed. The barrier would tell; where the wait for it was
// given up there is only time, here a millisecond, which is some thousand times what a store takes.
FUSEDRNN_DEVICE void outlast_remote_stores() {
  const int64_t begin = nanoseconds();
#pragma unroll 1
  while (nanoseconds() - begin < 1'000'000) asm volatile("nanosleep.u32 1000;");
}

#else  // a plan without clusters is all that such a device gets

FUSEDRNN_DEVICE void fence_mbarrier_init() { __trap(); }
FUSEDRNN_DEVICE void mbarrier_expect(Mbarrier*, int) { __trap(); }
FUSEDRNN_DEVICE void mbarrier_wait(Mbarrier*, uint32_t, Deadline&) { __trap(); }
FUSEDRNN_DEVICE void remote_store(void*, int, const Vector16&, Mbarrier*) { __trap(); }
FUSEDRNN_DEVICE void outlast_remote_stores() { __trap(); }

#endif

#else

inline void mbarrier_init(Mbarrier* barrier, int arrivals, Site site = Site::current()) {
  emulator::mbarrier_init(barrier, arrivals, site);
}
inline void fence_mbarrier_init(Site site = Site::current()) { emulator::fence_mbarrier_init(site); }
inline void mbarrier_expect(Mbarrier* barrier, int bytes, Site site = Site::current()) {
  emulator::mbarrier_expect(barrier, bytes, site);
}
inline void mbarrier_wait(Mbarrier* barrier, uint32_t parity, Deadline& deadline,
                          Site site = Site::current()) {
  deadline.poll([&] { return emulator::mbarrier_wait(barrier, parity, site); });
}
inline void remote_store(void* mine, int rank, const Vector16& v, Mbarrier* barrier,
                         Site site = Site::current()) {
  emulator::remote_store(mine, rank, v.words, barrier, site);
}
inline void outlast_remote_stores(Site site = Site::current()) { emulator::outlast_remote_stores(site); }

#endif

}  // namespace fusedrnn::device
