// Matrix products of a few rows with packed weights: the tile that holds its accumulators in registers, and
// the packing it reads. A panel covers C vectors of columns and holds, for each k in turn, those C vectors.
//
// Sums are of T; what is multiplied are operands E: values of T, or pairs of bfloat16 (bfloat16_pairs.h), of
// which a lane of T holds one. K counts operands where both factors are made of them, and values where a
// factor is a matrix as the caller has it.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <new>
#include <type_traits>

#include "simd.h"

namespace fusedrnn::FUSEDRNN_ISA {

inline constexpr int kPanelVectors = 4;
inline constexpr int kMaxTileRows = 8;

// Accumulators of R rows and C columns, the C weights and one broadcast value must fit the registers. fp64,
// which is for checking, has a small tile: it keeps the library and its compile time small.
template <class T, int C>
inline constexpr int kTileRows = sizeof(T) == sizeof(double)               ? 2
                                 : (kRegisters - C - 2) / C < kMaxTileRows ? (kRegisters - C - 2) / C
                                                                           : kMaxTileRows;

// Values in an operand, and operands for so many values: the last may be filled up with a zero.
template <class E>
inline constexpr int kValuesOf = 1;
template <class E>
constexpr int64_t operands_for(int64_t values) {
  return (values + kValuesOf<E> - 1) / kValuesOf<E>;
}

// Rows of a matrix: row b begins at p + b * ld.
template <class T>
struct Rows {
  T* p;
  int64_t ld;
  T* operator[](int64_t b) const { return p + b * ld; }
};

// out[r][c] = bias[c] + sum over k of rows[r][k] * panel[k][c], for R rows and C vectors; bias may be null.
template <int R, int C, class E, class T>
__attribute__((noinline)) void product_tile(const E* const* rows, const E* panel, int64_t K, const T* bias,
                                            T* out) {
  constexpr int W = Simd<T>::kWidth, kAhead = 16 * W;
  const E* a[R];
  Simd<T> acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) a[r] = rows[r];
#pragma GCC unroll 8
  for (int c = 0; c < C; ++c) {
    const Simd<T> start = bias ? Simd<T>::load(bias + c * W) : Simd<T>(T(0));
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) acc[r][c] = start;
  }
  for (int64_t k = 0; k < K; ++k, panel += C * W) {
    Simd<E> b[C];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      b[c] = Simd<E>::load(panel + c * W);
      __builtin_prefetch(panel + kAhead + c * W);  // it comes from the second cache, faster if asked for
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Simd<E> s(a[r][k]);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) acc[r][c] = multiply_add(acc[r][c], s, b[c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) acc[r][c].store(out + (r * C + c) * W);
}

// The same for one row, by weights whose rows begin ld apart. Several sums for each column, because a single
// one would wait for its own last addition at every k.
template <int C, class E, class T>
__attribute__((noinline)) void product_row(const E* a, const E* weights, int64_t ld, int64_t K, const T* bias,
                                           T* out) {
  using V = Simd<T>;
  constexpr int W = V::kWidth, kSums = C * 4 <= kRegisters / 2 ? 4 : C * 2 <= kRegisters / 2 ? 2 : 1;
  V acc[kSums][C];
#pragma GCC unroll 16
  for (int c = 0; c < C; ++c) {
    acc[0][c] = bias ? V::load(bias + c * W) : V(T(0));
#pragma GCC unroll 4
    for (int i = 1; i < kSums; ++i) acc[i][c] = V(T(0));
  }
  int64_t k = 0;
  for (; k + kSums <= K; k += kSums, weights += kSums * ld)
#pragma GCC unroll 4
    for (int i = 0; i < kSums; ++i) {
      const Simd<E> s(a[k + i]);
#pragma GCC unroll 16
      for (int c = 0; c < C; ++c)
        acc[i][c] = multiply_add(acc[i][c], s, Simd<E>::load(weights + i * ld + c * W));
    }
  for (; k < K; ++k, weights += ld)
#pragma GCC unroll 16
    for (int c = 0; c < C; ++c)
      acc[0][c] = multiply_add(acc[0][c], Simd<E>(a[k]), Simd<E>::load(weights + c * W));
#pragma GCC unroll 16
  for (int c = 0; c < C; ++c) {
#pragma GCC unroll 4
    for (int i = 1; i < kSums; ++i) acc[0][c] = acc[0][c] + acc[i][c];
    acc[0][c].store(out + c * W);
  }
}

// Calls f with count, in [1, Max], as a compile-time constant.
template <int Max, class F>
FUSEDRNN_HD void with_count(int64_t count, const F& f) {
  if constexpr (Max > 1)
    if (count < Max) return with_count<Max - 1>(count, f);
  f(std::integral_constant<int, Max>());
}

// The product of the rows a[0], a[1], ... with a panel of C vectors, in tiles as even as they can be. Each
// goes to consume(first_row, tile_rows, values [tile_rows, C, W]) while it is in the first cache. They are
// left one after another in out; or nowhere, if that is null.
template <class E, class T, class Source, class Consume>
void multiply(const Source& a, int64_t rows, const E* panel, int64_t K, int C, const T* bias, T* out,
              const Consume& consume) {
  alignas(kVectorBytes) T values[kMaxTileRows * kPanelVectors * Simd<T>::kWidth];
  with_count<kPanelVectors>(C, [&](auto vectors) {
    constexpr int kRows = kTileRows<T, vectors()>;
    for (int64_t first = 0, tiles = (rows + kRows - 1) / kRows; tiles > 0; --tiles) {
      const int64_t size = (rows - first + tiles - 1) / tiles;
      T* const tile = out ? out + first * C * Simd<T>::kWidth : values;
      with_count<kRows>(size, [&](auto tile_rows) {
        if constexpr (tile_rows() == 1) {
          product_row<vectors()>(a[first], panel, vectors() * Simd<T>::kWidth, K, bias, tile);
        } else {
          const E* sources[tile_rows()];
          for (int r = 0; r < tile_rows(); ++r) sources[r] = a[first + r];
          product_tile<tile_rows(), vectors()>(sources, panel, K, bias, tile);
        }
      });
      consume(first, size, tile);
      first += size;
    }
  });
}

// Panels over `columns` columns: full ones of kPanelVectors vectors, then one with the vectors that are left.
template <class T>
struct Panels {
  static constexpr int W = Simd<T>::kWidth;
  int64_t columns, K;

  int64_t count() const { return (columns + kPanelVectors * W - 1) / (kPanelVectors * W); }
  int64_t vectors(int64_t panel) const {
    const int64_t left = (columns + W - 1) / W - panel * kPanelVectors;
    return left < kPanelVectors ? left : kPanelVectors;
  }
  int64_t offset(int64_t panel) const { return panel * kPanelVectors * W * K; }
  int64_t size() const { return (columns + W - 1) / W * W * K; }
};

// Transposes a block of W rows of W lanes in place: halves of ever smaller pairs of rows change places.
template <class T, int Distance = Simd<T>::kWidth / 2>
FUSEDRNN_HD void transpose(Simd<T> (&rows)[Simd<T>::kWidth]) {
  constexpr int W = Simd<T>::kWidth;
  typename VectorOf<T>::Lanes low, high;
  for (int lane = 0; lane < W; ++lane) {
    low[lane] = lane & Distance ? W + lane - Distance : lane;
    high[lane] = lane & Distance ? W + lane : lane + Distance;
  }
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    if (i & Distance) continue;
    const auto a = rows[i].v, b = rows[i + Distance].v;
    rows[i].v = __builtin_shuffle(a, b, low);
    rows[i + Distance].v = __builtin_shuffle(a, b, high);
  }
  if constexpr (Distance > 1) transpose<T, Distance / 2>(rows);
}

// panel[k][c][lane] = w[row(c, lane)][k]: rows of w, of K values, become columns of operands. `row` yields -1
// for padding.
template <class E, class Weight, class Row>
void pack_rows(const Weight* w, int64_t K, int C, E* panel, const Row& row) {
  constexpr int W = Simd<E>::kWidth, kBlock = W * kValuesOf<E>;
  for (int64_t k = 0; k < K; k += kBlock) {
    const int values = static_cast<int>(K - k < kBlock ? K - k : kBlock);
    for (int c = 0; c < C; ++c) {
      Simd<E> block[W];
      for (int lane = 0; lane < W; ++lane) {
        const int64_t source = row(c, lane);
        block[lane] = source < 0 ? Simd<E>(E(0)) : Simd<E>::load(w + source * K + k, values);
        __builtin_prefetch(w + std::max<int64_t>(source, 0) * K + k +
                           4 * kBlock);  // more streams than are seen
      }
      transpose(block);
      for (int j = 0; j < operands_for<E>(values); ++j)
        block[j].store(panel + ((k / kValuesOf<E> + j) * C + c) * W);
    }
  }
}

// As multiply(), by weights that are not packed: lane j of vector c is the product with row(c, j) of w, of K
// values.
template <class E, class T, class Weight, class Source, class Row, class Consume>
void multiply_unpacked(const Source& rows_of_a, int64_t rows, const Weight* w, int64_t K, int C,
                       const Row& row, const T* bias, T* out, const Consume& consume) {
  using V = Simd<T>;
  constexpr int W = V::kWidth, kGroup = W < 4 ? W : 4;  // rows of w at a time
  constexpr int kValues = kValuesOf<E>, kBlock = W * kValues;
  alignas(kVectorBytes) T values[kPanelVectors * W];
  for (int64_t r = 0; r < rows; ++r) {
    const E* const a = rows_of_a[r];
    T* const tile = out ? out + r * C * W : values;
    for (int c = 0; c < C; ++c) {
      V sums[W];
      for (int lane = 0; lane < W; lane += kGroup) {
        const Weight* source[kGroup];  // of padding, any row
        V sum[kGroup];
        for (int j = 0; j < kGroup; ++j) {
          source[j] = w + std::max<int64_t>(row(c, lane + j), 0) * K;
          sum[j] = V(T(0));
        }
        for (int64_t k = 0; (k + W) * kValues <= K; k += W)
          for (int j = 0; j < kGroup; ++j)
            sum[j] = multiply_add(sum[j], Simd<E>::load(a + k), Simd<E>::load(source[j] + k * kValues));
        if (const int64_t done = K / kBlock * kBlock, left = K - done; left > 0)
          for (int j = 0; j < kGroup; ++j)
            sum[j] = multiply_add(sum[j], Simd<E>::load(a + done / kValues, operands_for<E>(left)),
                                  Simd<E>::load(source[j] + done, left));
        for (int j = 0; j < kGroup; ++j) sums[lane + j] = sum[j];
      }
      transpose(sums);
      V total = V::load(bias + c * W);
      for (int lane = 0; lane < W; ++lane) total = total + sums[lane];
      total.store(tile + c * W);
    }
    consume(r, 1, tile);
  }
}

// Calls store(sums over k of a[k] * w[k][j], address of out[j], lanes) for columns whose number is a multiple
// of the lanes, by w as it is; of as many at a time as have registers, so that each row of w is read at
// length.
template <class T, int C = kRegisters / 2, class Store>
void multiply_row(const T* a, const T* w, int64_t ld, int64_t K, int64_t columns, T* out,
                  const Store& store) {
  constexpr int W = Simd<T>::kWidth;
  alignas(kVectorBytes) T values[C * W];
  for (; columns >= C * W; columns -= C * W, w += C * W, out += C * W) {
    product_row<C>(a, w, ld, K, static_cast<const T*>(nullptr), values);
    for (int c = 0; c < C; ++c) store(Simd<T>::load(values + c * W), out + c * W, W);
  }
  if constexpr (C > 1)
    if (columns > 0) multiply_row<T, C / 2>(a, w, ld, K, columns, out, store);
}

// One panel of w [columns, K] transposed: column j of the product is row j of w.
template <class T>
void pack_transposed(const T* w, const Panels<T>& panels, int64_t panel, T* out) {
  const int64_t first = panel * kPanelVectors * Panels<T>::W;
  pack_rows(w, panels.K, panels.vectors(panel), out + panels.offset(panel), [&](int c, int lane) {
    const int64_t column = first + c * Panels<T>::W + lane;
    return column < panels.columns ? column : -1;
  });
}

// One panel of w [K, columns] as it is.
template <class T>
void pack_natural(const T* w, const Panels<T>& panels, int64_t panel, T* out) {
  const int64_t first = panel * kPanelVectors * Panels<T>::W, width = panels.vectors(panel) * Panels<T>::W;
  const int64_t valid = panels.columns - first < width ? panels.columns - first : width;
  out += panels.offset(panel);
  for (int64_t k = 0; k < panels.K; ++k, out += width) {
    const T* source = w + k * panels.columns + first;
    for (int64_t j = 0; j < valid; ++j) out[j] = source[j];
    for (int64_t j = valid; j < width; ++j) out[j] = T(0);
  }
}

// Calls store(sums over k of a[r][k] * w[k][j], address of out[r][j], lanes) for the columns of one panel.
template <class T, class Store>
void multiply_panel(const T* a, int64_t lda, int64_t rows, const Panels<T>& panels, const T* packed,
                    int64_t panel, T* out, int64_t ldo, const Store& store) {
  constexpr int W = Simd<T>::kWidth;
  const int64_t first = panel * kPanelVectors * W;
  const int C = static_cast<int>(panels.vectors(panel));
  constexpr T* kNone = nullptr;
  multiply(Rows<const T>{a, lda}, rows, packed + panels.offset(panel), panels.K, C, kNone, kNone,
           [&](int64_t r0, int64_t size, const T* values) {
             for (int64_t r = 0; r < size; ++r)
               for (int c = 0; c < C; ++c, values += W) {
                 const int64_t left = panels.columns - first - c * W;
                 const int lanes = static_cast<int>(left < W ? left : W);
                 T* target = out + (r0 + r) * ldo + first + c * W;
                 store(Simd<T>::load(values), target, lanes);
               }
           });
}

// Cache-aligned scratch memory. (Not std::vector: its code would be shared between instruction sets.)
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t n) : p_(static_cast<T*>(std::aligned_alloc(64, (n * sizeof(T) + 64) / 64 * 64))) {
    if (!p_) throw std::bad_alloc();
  }
  ~Buffer() { std::free(p_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return p_; }

 private:
  T* p_;
};

}  // namespace fusedrnn::FUSEDRNN_ISA
