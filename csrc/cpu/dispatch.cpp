#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace fusedrnn {
namespace {

bool bf16_dot_emulated = false;

bool runs(Isa isa) {
  switch (isa) {
    case Isa::avx512bf16:
      return runs(Isa::avx512) && (__builtin_cpu_supports("avx512bf16") || bf16_dot_emulated);
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::portable:
      return true;
  }
  return false;
}

Kernels with_bf16_dot() {
  Kernels set = avx512::kernels;
  set.isa = Isa::avx512bf16;
  set.f32.forward = avx512bf16::forward;
  return set;
}

Kernels choose() {
  const char* variable = std::getenv("FUSEDRNN_CPU_ISA");
  const std::string forced = variable ? variable : "";
  std::string names;
  for (const Kernels& set : {with_bf16_dot(), avx512::kernels, avx2::kernels, portable::kernels}) {
    names += (names.empty() ? "" : ", ") + std::string(set.name());
    if (!forced.empty() && forced != set.name()) continue;
    if (runs(set.isa)) return set;
    if (!forced.empty()) throw std::runtime_error("FUSEDRNN_CPU_ISA=" + forced + ": this processor lacks it");
  }
  throw std::runtime_error("FUSEDRNN_CPU_ISA=" + forced + ": choose one of " + names);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace fusedrnn

// For tests of avx512bf16 on a processor that lacks it: they emulate its instruction, and say so before the
// set is chosen. Not a variable of the environment, which could end a user's process.
extern "C" __attribute__((visibility("default"))) void fusedrnn_cpu_bf16_dot_is_emulated() {
  fusedrnn::bf16_dot_emulated = true;
}
