#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"

namespace fusedrnn {
namespace {

bool runs(const Kernels& set) {
  const std::string isa = set.isa;
  if (isa == "avx512")
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (isa == "avx2") return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  return true;
}

const Kernels& choose() {
  const char* forced = std::getenv("FUSEDRNN_CPU_ISA");
  for (const Kernels* set : {&avx512::kernels, &avx2::kernels, &portable::kernels}) {
    if (forced && *forced && std::string(forced) != set->isa) continue;
    if (runs(*set)) return *set;
    if (forced && *forced)
      throw std::runtime_error(std::string("FUSEDRNN_CPU_ISA=") + forced + ": this processor lacks it");
  }
  throw std::runtime_error(std::string("FUSEDRNN_CPU_ISA=") + forced + ": choose avx512, avx2 or portable");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace fusedrnn
