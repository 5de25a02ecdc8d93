// The ops, and what each library that has them must define: forward, backward and plan of a checked call.
// libfusedrnn_cpu has cpu.cpp; libfusedrnn_cuda and libfusedrnn_emulator have device.cpp.
#pragma once

#include <torch/csrc/stable/library.h>

#include "call.h"

namespace fusedrnn {

struct Library {
  bool on_cuda;
  bool on_cpu_schedule;  // which has parameters of cells and gradients of the states of all steps
  bool keeps_gates;  // `saved` ends in what the cell saved; without, the backward computes the gates again
};
extern const Library kLibrary;

struct Outputs {
  Tensor y;
  Tensors final, saved;
};

struct Gradients {
  Tensor dx;
  Tensors dstate, dweight_ih, dweight_hh, dbias_ih, dbias_hh, dweight_hr, dparam;
};

Outputs forward(const Call& call, bool training);
Gradients backward(const Call& call, const Incoming& incoming);

// By which plan the pass of a call would run, as fusedrnn/explain.py reads it.
std::vector<int64_t> plan_of(const Call& call, bool backward);

// For the body of STABLE_TORCH_LIBRARY and STABLE_TORCH_LIBRARY_IMPL.
void define_ops(torch::stable::detail::StableLibrary& library);
void implement_ops(torch::stable::detail::StableLibrary& library);

}  // namespace fusedrnn
