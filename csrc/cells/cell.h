// The cell contract. A cell is the maths of one unit for one step, forward and backward; it knows no index,
// stride, dtype, thread or time. Every schedule takes a cell as a template parameter and calls it on scalars
// (CUDA threads, gradient checks in fp64) or on SIMD vectors of units (CPU), so a cell is written once.
#pragma once

#include <cmath>
#include <concepts>

#if defined(__CUDACC__)
#define FUSEDRNN_HD __host__ __device__ __forceinline__
#else
#define FUSEDRNN_HD inline __attribute__((always_inline))
#endif

namespace fusedrnn {

// A fixed number of values of one unit.
template <class V, int N>
struct Array {
  V values[N > 0 ? N : 1];
  FUSEDRNN_HD V& operator[](int i) { return values[i]; }
  FUSEDRNN_HD const V& operator[](int i) const { return values[i]; }
};

// Parameters of a unit, K of them, that a step reads beside its gates: none, unless a cell says kParams.
template <class Cell>
inline constexpr int params_of = 0;
template <class Cell>
  requires requires { Cell::kParams; }
inline constexpr int params_of<Cell> = Cell::kParams;

// What a step of `Cell` yields: the next state, and what its backward will ask for.
template <class Cell, class V>
struct Forward {
  Array<V, Cell::kStates> state;
  Array<V, Cell::kSaved> saved;
};

// Gradients of a step. `dgx` and `dgh` differ where the cell gates the recurrent contribution (GRU's n).
template <class Cell, class V>
struct Backward {
  Array<V, Cell::kGates> dgx, dgh;
  Array<V, Cell::kStates> dstate;
};

template <class Cell, class V>
  requires(params_of<Cell> > 0)
struct Backward<Cell, V> {
  Array<V, Cell::kGates> dgx, dgh;
  Array<V, Cell::kStates> dstate;
  Array<V, params_of<Cell>> dparam;
};

template <class Cell, class V>
concept StepsAlone =
    requires(Array<V, Cell::kGates> g, Array<V, Cell::kStates> s, Array<V, Cell::kSaved> saved) {
      { Cell::forward(g, g, s) } -> std::same_as<Forward<Cell, V>>;
      { Cell::backward(s, saved, s, s) } -> std::same_as<Backward<Cell, V>>;
    };

template <class Cell, class V>
concept StepsWithParams = requires(Array<V, Cell::kGates> g, Array<V, Cell::kStates> s,
                                   Array<V, Cell::kSaved> saved, Array<V, params_of<Cell>> param) {
  { Cell::forward(g, g, s, param) } -> std::same_as<Forward<Cell, V>>;
  { Cell::backward(s, saved, s, s, param) } -> std::same_as<Backward<Cell, V>>;
};

template <class Cell, class V>
concept CellOn = (StepsAlone<Cell, V> || StepsWithParams<Cell, V>) && requires {
  { Cell::kSameGates } -> std::convertible_to<bool>;  // dgx == dgh
  { Cell::kReadsH } -> std::convertible_to<bool>;     // reads state[0] itself, not only through gh
};

// Scalar forms of the functions cells call; cpu/simd.h has the vector forms.

template <class T>
concept Scalar = std::floating_point<T>;

template <Scalar T>
FUSEDRNN_HD T sigmoid(T x) {
  return T(1) / (T(1) + std::exp(-x));
}

template <Scalar T>
FUSEDRNN_HD T tanh(T x) {
  return std::tanh(x);
}

// a < b ? x : y; a NaN on either side yields y.
template <Scalar T>
FUSEDRNN_HD T where_less(T a, T b, T x, T y) {
  return a < b ? x : y;
}

}  // namespace fusedrnn
