// What a sequence is, in plain structs that every schedule shares.
//
// Dims: T time, B batch, I input, H hidden, P width of h (H, or the projection's), N independent recurrences,
// G gates, S states. Rows are time-major: row (t, b) of a padded sequence is t*B + b; of a packed one, the
// rows of step t are those of the sequences still alive, which come first in the batch.
#pragma once

#include <cstdint>

#include "cells/cell.h"  // FUSEDRNN_HD

namespace fusedrnn {

// The numbers are part of the ops' schemas: fusedrnn/cells.py has the same.
enum class CellId : int64_t { kLstm = 0, kGru = 1, kRnnTanh = 2, kRnnRelu = 3, kLstmPeephole = 4 };

inline constexpr int kMaxStates = 2;

// How h is rounded at every step: to the dtype of the caller's tensors, of which x and h0 are.
enum class Rounding { kNone, kBFloat16, kHalf };

struct Steps {
  int64_t T, B;
  const int64_t* offsets;  // [T+1] first row of each step; null when padded

  FUSEDRNN_HD int64_t offset(int64_t t) const { return offsets ? offsets[t] : t * B; }
  FUSEDRNN_HD int64_t count(int64_t t) const { return offsets ? offsets[t + 1] - offsets[t] : B; }
  FUSEDRNN_HD int64_t rows() const { return offset(T); }
};

struct BFloat16 {
  uint16_t bits;  // the upper half of a float
};

// A matrix, row by row: of T, or, for the forward pass of floats, of bfloat16, which is half as much to read.
template <class T>
struct Matrix {
  const T* wide;
  const BFloat16* narrow;  // null, or wide is
};

// The weights of one of the N recurrences, in torch's layout; biases and projection may be null.
template <class T>
struct Recurrence {
  Matrix<T> weight_ih;  // [G*H, I]
  Matrix<T> weight_hh;  // [G*H, P]
  const T* bias_ih;     // [G*H]
  const T* bias_hh;     // [G*H]
  const T* weight_hr;   // [P, H]
  int64_t input;        // the first feature of x that is its input
  bool reverse;
  const T* param;  // [K, H], the cell's parameters; null for a cell that has none
};

template <class T>
struct ForwardParams {
  Steps steps;
  int64_t N, I, H, P;
  const Recurrence<T>* recurrences;  // [N]
  Rounding rounding;
  const T* x;  // [T, B, *] or, packed, [rows, *], with these strides; a feature follows the one before
  int64_t x_step, x_row;
  T* gates;  // [rows, N, slots, H] or null: what the cell saves
  int64_t slots;
  const T* h0;           // [N, B, P]
  T* y;                  // [rows, N, P]
  T* h_final;            // [N, B, P]
  T* state[kMaxStates];  // [1..]: [N, B, H], initial on entry, final on exit
  T* kept[kMaxStates];   // [rows, N, H] or null: the states of all steps; [0] is h before its projection
};

template <class T>
struct BackwardParams {
  Steps steps;
  int64_t N, H, P;
  const Recurrence<T>* recurrences;
  const T* gates;  // [rows, N, slots, H] as the forward left it
  int64_t slots;
  const T* h0;                  // [N, B, P]
  const T* state0[kMaxStates];  // [1..]: [N, B, H], the initial states
  const T* y;                   // [rows, N, P]
  const T* kept[kMaxStates];    // as the forward left them
  const T* dy;                  // [rows, N, P] or null
  const T* dkept[kMaxStates];   // [1..]: [rows, N, H] or null: gradients of the states of all steps
  T* dstate[kMaxStates];        // [N, B, P], [N, B, H]: of the final states on entry, of the initial on exit
  T *dgx, *dgh;                 // [rows, N, G, H]; one buffer for cells whose gates share a gradient
  T* dprojected;                // [rows, N, P]: gradient of the projected h of each step; null without
  T* dparam;                    // [N, B, K, H]: added to; null for a cell that has no parameters
  T* h_previous;                // [rows, N, P]: the h each row's step started from; null if not wanted
  T *const *dbias_ih, *const *dbias_hh;  // [N] of [G*H]; null if not wanted
};

}  // namespace fusedrnn
