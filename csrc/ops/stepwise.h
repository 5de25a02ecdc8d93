// The stepwise schedule: at each step one product for each recurrence, by torch, and one kernel for all. It
// runs what no persistent kernel can, and only what a CUDA graph can capture.
#pragma once

#include "products.h"
#include "schedule.h"

namespace fusedrnn::cuda {

// Returns the final states; forward.final_state is not written. With a projection, `unprojected`
// [rows, N, H] is what the kernel leaves of h, and y is written here.
Tensors run_steps(const Call& call, const Forward& forward, const Tensor& y, const Tensor& unprojected,
                  void* stream);

// Fills in `sweep`, apart from h_previous: backward points into it. dy has the shape of y.
void run_steps(const Call& call, const Backward& backward, const std::optional<Tensor>& dy,
               const Tensors& dfinal, Sweep& sweep, void* stream);

}  // namespace fusedrnn::cuda
