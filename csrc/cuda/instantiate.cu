// Compiled once for each cell and operand, which the build names in FUSEDRNN_CELL and FUSEDRNN_OPERAND.
#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../cells/rnn.h"
#include "persistent_kernels.h"

namespace fusedrnn::cuda {

template <class Pass>
auto kernel_of(Exchange exchange) -> void (*)(typename Pass::Params) {
  switch (exchange) {
    case Exchange::kBlock:
      return persistent<Pass, BlockExchange>;
    case Exchange::kCluster:
      return persistent<Pass, ClusterExchange>;
    default:
      return persistent<Pass, GridExchange>;
  }
}

template <class Cell, class Op>
auto PersistentKernels<Cell, Op>::forward(Exchange exchange) -> void (*)(ForwardPassParams<E>) {
  return kernel_of<ForwardPass<Cell, Op>>(exchange);
}

template <class Cell, class Op>
auto PersistentKernels<Cell, Op>::backward(Exchange exchange) -> void (*)(BackwardPassParams<E>) {
  return kernel_of<BackwardPass<Cell, Op>>(exchange);
}

template struct PersistentKernels<FUSEDRNN_CELL, FUSEDRNN_OPERAND>;

}  // namespace fusedrnn::cuda
