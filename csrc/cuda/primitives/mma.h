// The matrix product of a warp: D[16, 8] += A[16, K] B[K, 8], K = 16 for 16-bit operands and 8 for tf32.
//
// Lane l holds, with g = l / 4 and q = l % 4, of D rows g (values 0, 1) and g + 8 (values 2, 3), columns 2q
// and 2q + 1; of A and B what the PTX ISA says under "Matrix Fragments for mma.m16n8k16" and "mma.m16n8k8".
// A product orders no memory.
#pragma once

#include "thread.h"

namespace fusedrnn::device {

struct FragmentA {
  uint32_t words[4];
};
struct FragmentB {
  uint32_t words[2];
};

#if defined(__CUDACC__)

#define FUSEDRNN_MMA(name, shape)                                                                       \
  FUSEDRNN_DEVICE void name(float (&d)[4], const FragmentA& a, const FragmentB& b) {                    \
    asm volatile("mma.sync.aligned." shape " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"     \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                       \
                 : "r"(a.words[0]), "r"(a.words[1]), "r"(a.words[2]), "r"(a.words[3]), "r"(b.words[0]), \
                   "r"(b.words[1]));                                                                    \
  }
FUSEDRNN_MMA(mma_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
FUSEDRNN_MMA(mma_fp16, "m16n8k16.row.col.f32.f16.f16.f32")
FUSEDRNN_MMA(mma_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef FUSEDRNN_MMA

#else

inline void mma_bf16(float (&d)[4], const FragmentA& a, const FragmentB& b) {
  emulator::mma(emulator::Format::kBFloat16, d, a.words, b.words);
}
inline void mma_fp16(float (&d)[4], const FragmentA& a, const FragmentB& b) {
  emulator::mma(emulator::Format::kHalf, d, a.words, b.words);
}
inline void mma_tf32(float (&d)[4], const FragmentA& a, const FragmentB& b) {
  emulator::mma(emulator::Format::kTf32, d, a.words, b.words);
}

#endif

}  // namespace fusedrnn::device
