// The persistent kernels of one cell and one operand, which instantiate.cu compiles, for run.cu to launch.
#pragma once

#include "backward.cuh"
#include "forward.cuh"

namespace fusedrnn::cuda {

template <class Cell, class Op>
struct PersistentKernels {
  using E = typename Op::Element;
  static auto forward(Exchange exchange) -> void (*)(ForwardPassParams<E>);
  static auto backward(Exchange exchange) -> void (*)(BackwardPassParams<E>);
};

}  // namespace fusedrnn::cuda
