// What the kernels must compute: a naive loop in double, over one sequence at a time.
//
// It follows the kernel: each step starts from the h, or from the gradients of the gates, that the kernel
// itself gave for the step before. So a difference is that of one step, and no tolerance hides the growth of
// errors.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <vector>

#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../cells/rnn.h"
#include "../cuda/kernels.h"
#include "../cuda/primitives/numbers.h"

namespace fusedrnn::emulator {

using Values = std::vector<double>;

inline double rounded(cuda::Number number, double x) {
  using namespace device;
  const auto narrow_from = static_cast<float>(x);
  switch (number) {
    case cuda::Number::kBFloat16:
      return widen(narrow<BFloat16>(narrow_from));
    case cuda::Number::kHalf:
      return widen(narrow<Half>(narrow_from));
    case cuda::Number::kFloat:
      return narrow_from;
    case cuda::Number::kDouble:
      break;
  }
  return x;
}

// Inputs of a pass, each value one that its dtype has; layouts as in cuda/kernels.h.
struct Case {
  CellId cell;
  cuda::Number number;
  bool tf32, packed;
  int64_t T, B, N, H;
  std::vector<int64_t> offsets;  // [T+1], also if not packed
  std::vector<bool> reverse;     // [N]
  Values weight, bias_ih, bias_hh;
  Values gx, gh, h_previous, y, kept, dy;
  Values state0[kMaxStates], dfinal[kMaxStates];

  int64_t rows() const { return offsets.back(); }
  int64_t index(int64_t row, int64_t n) const { return (row * N + n) * H; }  // of [rows, N, H]
  int64_t initial(int64_t n, int64_t b) const { return (n * B + b) * H; }    // of [N, B, H]
  cuda::Number accumulated() const {
    return number == cuda::Number::kDouble ? cuda::Number::kDouble : cuda::Number::kFloat;
  }
  double operand(double x) const {
    return tf32 ? device::round_tf32(static_cast<float>(x)) : rounded(number, x);
  }

  // Rows of sequence b in the order in which recurrence n visits them.
  std::vector<int64_t> visited(int64_t n, int64_t b) const {
    std::vector<int64_t> rows;
    for (int64_t s = 0; s < T; ++s) {
      const int64_t t = reverse[n] ? T - 1 - s : s;
      if (b < offsets[t + 1] - offsets[t]) rows.push_back(offsets[t] + b);
    }
    return rows;
  }
};

struct ForwardResult {
  Values y, kept;
  std::array<Values, kMaxStates> final_state;
};
struct BackwardResult {
  Values dgx, dgh, h_previous;
  std::array<Values, kMaxStates> dstate0;
};

// The largest difference, as a multiple of what is tolerated.
class Comparison {
 public:
  explicit Comparison(cuda::Number number)
      : unit_(number == cuda::Number::kBFloat16 ? 0x1p-8
              : number == cuda::Number::kHalf   ? 0x1p-11
              : number == cuda::Number::kFloat  ? 0x1p-24
                                                : 0x1p-53),
        before_(number == cuda::Number::kDouble ? 1e-14 : 4e-6) {}

  // Results are rounded once, by half a unit in the last place. Before that come sums in fp32 (fp64), whose
  // terms are up to about 1, and in fp32 exponentials with a relative error of 1e-6.
  void operator()(const char* what, int64_t index, double got, double want) {
    const double tolerance = unit_ * std::abs(want) + before_ * (1 + std::abs(want));
    const double error = std::isnan(got) ? INFINITY : std::abs(got - want) / tolerance;
    if (error <= max_error_) return;
    max_error_ = error;
    if (max_error_ > 1)
      worst_ = std::string(what) + "[" + std::to_string(index) + "] is " + std::to_string(got) + ", not " +
               std::to_string(want);
  }
  double max_error() const { return max_error_; }
  const std::string& worst() const { return worst_; }  // empty: all is within the tolerance

 private:
  double unit_, before_, max_error_ = 0;
  std::string worst_;
};

// W_hh h of one sequence. [G, H]
template <class Cell>
Values recurrent(const Case& c, int64_t n, const Values& h) {
  Values gh(Cell::kGates * c.H);
  for (int64_t i = 0; i < std::ssize(gh); ++i)
    for (int64_t k = 0; k < c.H; ++k)
      gh[i] += c.operand(c.weight[(n * Cell::kGates * c.H + i) * c.H + k]) * c.operand(h[k]);
  return gh;
}

// W_hh^T dgh of one sequence: that of a unit. dgh: [G, H]
template <class Cell>
double recurrent_backward(const Case& c, int64_t n, int64_t unit, const double* dgh) {
  double sum = 0;
  for (int64_t k = 0; k < Cell::kGates * c.H; ++k)
    sum += c.operand(c.weight[(n * Cell::kGates * c.H + k) * c.H + unit]) * c.operand(dgh[k]);
  return sum;
}

// Gates of a unit, biases added: `gx` and `gh` are [G, H].
template <class Cell>
struct Gates {
  Array<double, Cell::kGates> gx, gh;

  Gates(const Case& c, int64_t n, int64_t unit, const double* of_x, const double* of_h) {
    for (int gate = 0; gate < Cell::kGates; ++gate) {
      const int64_t at = gate * c.H + unit, bias = n * Cell::kGates * c.H + at;
      gx[gate] = of_x[at] + c.bias_ih[bias];
      gh[gate] = (of_h ? of_h[at] : 0) + c.bias_hh[bias];
    }
  }
};

// Steps a sequence: step(row, h, gh, next) gets the h it starts from and W_hh h, and the states of all units
// as they come out; it returns the h that the next step is to start from.
template <class Cell, class Step>
void run_forward(const Case& c, int64_t n, int64_t b, Step step) {
  std::vector<Array<double, Cell::kStates>> states(c.H);
  Values h(c.H);
  for (int64_t unit = 0; unit < c.H; ++unit) {
    for (int s = 0; s < Cell::kStates; ++s) states[unit][s] = c.state0[s][c.initial(n, b) + unit];
    h[unit] = states[unit][0];
  }
  for (const int64_t row : c.visited(n, b)) {
    const Values gh = recurrent<Cell>(c, n, h);
    for (int64_t unit = 0; unit < c.H; ++unit) {
      const Gates<Cell> gates(c, n, unit, &c.gx[c.index(row, n) * Cell::kGates], gh.data());
      states[unit][0] = h[unit];
      states[unit] = Cell::forward(gates.gx, gates.gh, states[unit]).state;
    }
    h = step(row, h, gh, states);
  }
}

template <class Cell>
void check_forward(const Case& c, const ForwardResult& got, Comparison& compare) {
  for (int64_t n = 0; n < c.N; ++n)
    for (int64_t b = 0; b < c.B; ++b) {
      Array<Values, Cell::kStates> last;
      run_forward<Cell>(c, n, b, [&](int64_t row, const Values&, const Values&, const auto& states) {
        Values h(c.H);
        for (int s = 0; s < Cell::kStates; ++s) last[s].resize(c.H);
        for (int64_t unit = 0; unit < c.H; ++unit) {
          const int64_t at = c.index(row, n) + unit;
          compare("y", at, got.y[at], states[unit][0]);
          last[0][unit] = h[unit] = got.y[at];
          if constexpr (Cell::kStates > 1) {
            if (!got.kept.empty()) compare("kept", at, got.kept[at], states[unit][1]);
            last[1][unit] = states[unit][1];
          }
        }
        return h;
      });
      for (int s = 0; s < Cell::kStates; ++s)
        for (int64_t unit = 0; unit < c.H; ++unit) {
          const int64_t at = c.initial(n, b) + unit;
          compare("final_state", at, got.final_state[s][at], last[s][unit]);
        }
    }
}

// Fills in what a backward asks of its forward.
template <class Cell>
void record_forward(Case& c) {
  const int64_t all = c.rows() * c.N * c.H;
  c.y.resize(all);
  c.h_previous.resize(all);
  c.kept.resize(all);
  c.gh.resize(all * Cell::kGates);
  for (int64_t n = 0; n < c.N; ++n)
    for (int64_t b = 0; b < c.B; ++b)
      run_forward<Cell>(c, n, b, [&](int64_t row, const Values& h, const Values& gh, const auto& states) {
        Values next(c.H);
        for (int64_t unit = 0; unit < c.H; ++unit) {
          const int64_t at = c.index(row, n) + unit;
          c.h_previous[at] = h[unit];
          c.y[at] = next[unit] = rounded(c.number, states[unit][0]);
          c.kept[at] = rounded(c.accumulated(), states[unit][Cell::kStates - 1]);
        }
        std::copy(gh.begin(), gh.end(), &c.gh[c.index(row, n) * Cell::kGates]);
        return next;
      });
  for (size_t i = 0; i < c.gh.size(); ++i) {
    if (Cell::kSameGates) c.gx[i] = rounded(c.accumulated(), c.gx[i] + c.gh[i]);
    c.gh[i] = Cell::kSameGates ? 0 : rounded(c.accumulated(), c.gh[i]);
  }
}

template <class Cell>
void check_backward(const Case& c, const BackwardResult& got, Comparison& compare) {
  constexpr int kGates = Cell::kGates, kStates = Cell::kStates;
  const Values& dgh = Cell::kSameGates ? got.dgx : got.dgh;
  for (int64_t n = 0; n < c.N; ++n)
    for (int64_t b = 0; b < c.B; ++b) {
      const std::vector<int64_t> rows = c.visited(n, b);
      const int64_t initial = c.initial(n, b);
      std::vector<Array<double, kStates>> dstates(c.H);
      for (int64_t unit = 0; unit < c.H; ++unit)
        for (int s = 0; s < kStates; ++s) dstates[unit][s] = c.dfinal[s][initial + unit];
      for (int64_t i = std::ssize(rows) - 1; i >= 0; --i) {
        const int64_t at = c.index(rows[i], n);
        for (int64_t unit = 0; unit < c.H; ++unit) {
          Array<double, kStates> state, next, dnext = dstates[unit];
          state[0] = c.h_previous[at + unit];
          next[0] = c.y[at + unit];
          if constexpr (kStates > 1) {
            state[1] = i > 0 ? c.kept[c.index(rows[i - 1], n) + unit] : c.state0[1][initial + unit];
            next[1] = c.kept[at + unit];
          }
          compare("h_previous", at + unit, got.h_previous[at + unit], state[0]);
          dnext[0] += c.dy[at + unit];
          const Gates<Cell> gates(c, n, unit, &c.gx[at * kGates], &c.gh[at * kGates]);
          const auto d = Cell::backward(dnext, Cell::forward(gates.gx, gates.gh, state).saved, state, next);
          for (int gate = 0; gate < kGates; ++gate) {
            const int64_t to = at * kGates + gate * c.H + unit;
            compare("dgx", to, got.dgx[to], d.dgx[gate]);
            if (!Cell::kSameGates) compare("dgh", to, got.dgh[to], d.dgh[gate]);
          }
          dstates[unit] = d.dstate;
        }
        for (int64_t unit = 0; unit < c.H; ++unit)
          dstates[unit][0] += recurrent_backward<Cell>(c, n, unit, &dgh[at * kGates]);
      }
      for (int s = 0; s < kStates; ++s)
        for (int64_t unit = 0; unit < c.H; ++unit)
          compare("dstate0", initial + unit, got.dstate0[s][initial + unit], dstates[unit][s]);
    }
}

}  // namespace fusedrnn::emulator
