// The CUDA schedules as functions that know nothing of torch. libfusedrnn_cuda runs them on a GPU; compiled
// with the emulator's primitives, libfusedrnn_emulator runs the same code on a CPU.
//
// Dims as in sequence.h; in a comment E is the dtype of the caller's tensors and A the one that is
// accumulated in: double for double, else float.
#pragma once

#include <string>

#include "../plan.h"
#include "../sequence.h"

namespace fusedrnn::cuda {

enum class Number { kBFloat16, kHalf, kFloat, kDouble };

// A launch runs that many recurrences; run() starts as many launches as are needed.
inline constexpr int kMaxRecurrences = 32;

// Weights of one recurrence, contiguous, in torch's layout; biases may be null.
struct Weights {
  const void* hh;       // [G*H, H] E
  const void* bias_ih;  // [G*H] E
  const void* bias_hh;  // [G*H] E
  bool reverse;
};

// Pointers are to device memory, also steps.offsets.
struct Forward {
  CellId cell;
  Number number;
  bool tf32;  // products of floats take tf32 operands
  Steps steps;
  int64_t N, H;
  const Weights* weights;          // [N], in host memory
  const void* gx;                  // [rows, N, G, H] A: W_ih x
  const void* state0[kMaxStates];  // [N, B, H] E
  void* y;                         // [rows, N, H] E
  void* final_state[kMaxStates];   // [N, B, H] E
  void* kept[kMaxStates];          // [1..]: [rows, N, H] A or null: the states of all steps
};

struct Backward {
  CellId cell;
  Number number;
  bool tf32;
  Steps steps;
  int64_t N, H;
  const Weights* weights;
  // What the gates are recomputed from, null for a cell that saves nothing: W_ih x, with W_hh h added if the
  // gates share their gradient; if they do not, W_hh h apart in gh.
  const void* gx;                  // [rows, N, G, H] A
  const void* gh;                  // [rows, N, G, H] A
  const void* h_previous;          // [rows, N, H] E: the h that each row's step started from
  const void* y;                   // [rows, N, H] E
  const void* kept[kMaxStates];    // as the forward left them
  const void* state0[kMaxStates];  // [1..]: [N, B, H] E
  const void* dy;                  // [rows, N, H] E or null
  const void* dfinal[kMaxStates];  // [N, B, H] E
  void* dstate0[kMaxStates];       // [N, B, H] E
  void* dgx;                       // [rows, N, G, H] E
  void* dgh;                       // [rows, N, G, H] E; null if the gates share their gradient
};

// One step of the stepwise schedule, between the products that the caller runs. Recurrence n is at t = s, or
// at T-1-s in reverse; in a backward, at the mirror image of that.
struct StepForward {
  int64_t s;
  const void* gh;           // [N, B, G, H] A: W_hh h of the sequences alive at the step
  void* state[kMaxStates];  // [N, B, H]: h in E, the others in A; updated
  void* projected_from;     // [rows, N, H] A, in place of h: what the caller projects. Else null
};

struct StepBackward {
  int64_t s;
  const void* dh;            // [N, B, H] A: W_hh^T dgh of the step before this one, or what replaces it
  void* dstate[kMaxStates];  // [N, B, H] A: [0] the part of dh that does not pass through gh; updated
};

// Memory that a launch needs besides its tensors: device memory, zeroed, that no other launch uses.
int64_t workspace_bytes(const PersistentPlan& plan, const PersistentPass& pass, int64_t N, int64_t B);

// Runs whole sequences as `plan` says. `status`, host memory that the device can write, becomes non-zero if a
// block waited for a peer that never came: the results are void then.
void run(const Forward& forward, const PersistentPlan& plan, void* workspace, uint32_t* status, void* stream);
void run(const Backward& backward, const PersistentPlan& plan, void* workspace, uint32_t* status,
         void* stream);

void run(const Forward& forward, const StepForward& step, void* stream);
void run(const Backward& backward, const StepBackward& step, void* stream);

// h_previous[row] of all rows: y of the step before, or h0. [rows, N, P] E from [rows, N, P] and [N, B, P].
void previous_rows(Number number, const Steps& steps, int64_t rows, int64_t N, int64_t P,
                   const Weights* weights, const void* h0, const void* y, void* h_previous, void* stream);

// Copies to device memory without another copy of `from`: the launch carries the values, so that a CUDA graph
// that captures it needs nothing of the caller's memory when it is replayed.
void upload(const int64_t* from, int64_t count, int64_t* to, void* stream);

// Makes the device current for the functions here. Torch's choice is not seen: its CUDA runtime is another.
void set_device(int device);

// What plan_persistent asks of a kernel and of the current device.
PersistentPass pass_of(CellId cell, Number number, bool tf32, bool backward);
GpuDevice device_limits();

// Whether the current device keeps all blocks of a launch resident, asked of the very kernel that it starts.
bool resident(const PersistentPlan& plan, bool backward, CellId cell, Number number, bool tf32);

// What run() takes as `status` on a device: one word for the life of the process.
uint32_t* status_word(int device);

}  // namespace fusedrnn::cuda
