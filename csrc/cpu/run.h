// A pass of the resident schedule for the cell that a number names.
#pragma once

#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../cells/rnn.h"
#include "kernels.h"

namespace fusedrnn::FUSEDRNN_ISA {

template <template <class, class> class Pass, class T, class Params>
void run(CellId cell, const Params& params, const ResidentPlan& plan, const ThreadPool& pool) {
  switch (cell) {
    case CellId::kLstm:
      Pass<Lstm, T>(params, plan, pool);
      break;
    case CellId::kGru:
      Pass<Gru, T>(params, plan, pool);
      break;
    case CellId::kRnnTanh:
      Pass<RnnTanh, T>(params, plan, pool);
      break;
    case CellId::kRnnRelu:
      Pass<RnnRelu, T>(params, plan, pool);
      break;
    case CellId::kLstmPeephole:
      Pass<LstmPeephole, T>(params, plan, pool);
      break;
  }
}

}  // namespace fusedrnn::FUSEDRNN_ISA
