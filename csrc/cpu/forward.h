// The forward pass of the resident schedule: weights packed once into panels that stay in cache for the whole
// sequence, all gates of a vector of units in one tile of accumulators, and the cell run on those registers.
//
// W_ih x is multiplied by the same tiles, for a few steps at a time, so that it is still in cache when the
// cell asks for it.
//
// Products take their factors as operands E: values as they are, or, where all of them are values of
// bfloat16, pairs of these. Rows of x and h are then written as pairs when they are about to be multiplied.
#pragma once

#include "schedule.h"

namespace fusedrnn::FUSEDRNN_ISA {

template <class Cell, class T, class E = T>
class ForwardPass {
  using V = Simd<T>;
  static_assert(CellOn<Cell, V> && Simd<E>::kWidth == V::kWidth);
  static constexpr int W = V::kWidth, G = Cell::kGates;
  // Vectors of units side by side: one where the gates fill the tile.
  static constexpr int kUnits = G == 1 ? kPanelVectors : 1;
  // So few rows that reading the weights where they are costs less than packing them.
  static constexpr int64_t kUnpackedRows = 8;
  static constexpr bool kConverted = !std::is_same_v<E, T>;
  // W_hh that is read from the third cache at every step, by a single row, is read as fast where it is.
  static constexpr int64_t kUnpackedBytes = int64_t{1} << 20;

 public:
  ForwardPass(const ForwardParams<T>& p, const ResidentPlan& plan, const ThreadPool& pool)
      : p_(p),
        layout_{p.steps, p.N, p.recurrences, plan},
        unit_vectors_((p.H + W - 1) / W),
        blocks_((unit_vectors_ + kUnits - 1) / kUnits),
        window_(window(plan)),
        packed_ih_(p.steps.rows() > kUnpackedRows),
        packed_hh_(packed_ih_ &&
                   (p.steps.B > 1 || G * p.H * operands_for<E>(p.P) * static_cast<int64_t>(sizeof(E)) <=
                                         plan.unit_slices * kUnpackedBytes)),
        in_passing_(packed_ih_ && window_ == p.steps.T && plan.row_chunks == 1),
        projection_{p.P, p.H},
        weights_ih_(packed_ih_ ? p.N * (in_passing_ ? plan.unit_slices * G * kUnits * W : width()) *
                                     operands_for<E>(p.I)
                               : 0),
        weights_hh_(packed_hh_ ? p.N * width() * operands_for<E>(p.P) : 0),
        bias_(2 * p.N * width()),
        inputs_(plan.unit_slices * p.N * p.steps.B * window_),
        row_operands_(std::max(window_ * operands_for<E>(p.I), operands_for<E>(p.P))),
        operands_(kConverted ? plan.unit_slices * p.N * p.steps.B * row_operands_ : 0),
        gx_(p.N * p.steps.B * window_ * width()),
        gh_(kUnits == 1 ? p.N * p.steps.B * width() : 0),
        projections_(projected() ? p.N * projection_.size() : 0),
        scratch_(projected() && !p.kept[0] ? p.N * p.steps.B * p.H : 0) {
    parallel_for(pool, p.N * blocks_, [&](int64_t i) { pack(i / blocks_, i % blocks_); });
    if (projected())
      parallel_for(pool, p.N * projection_.count(), [&](int64_t i) {
        const int64_t n = i / projection_.count();
        pack_transposed(p_.recurrences[n].weight_hr, projection_, i % projection_.count(),
                        projections_.get() + n * projection_.size());
      });
    layout_.run(pool, p.steps.T, [&](const Job& job, int64_t i, int64_t slice) {
      const auto blocks = layout_.slice_of(blocks_, slice);
      if (i % window_ == 0) project_input(job, i, slice, blocks);
      step(job, i, slice, blocks);
    });
    gather_final();
  }

 private:
  using Range = typename Layout<T>::Range;

  bool projected() const { return p_.recurrences[0].weight_hr != nullptr; }
  int64_t width() const { return unit_vectors_ * W * G; }  // of all panels of a recurrence
  int units(int64_t block) const {
    const int64_t left = unit_vectors_ - block * kUnits;
    return kUnits == 1 || left >= kUnits ? kUnits : static_cast<int>(left);
  }
  // Where a block's columns begin in a matrix of width() columns and K rows that is stored panel by panel.
  int64_t panel(int64_t n, int64_t block, int64_t K) const {
    return (n * width() + block * kUnits * W * G) * K;
  }
  // The row of the weights that is a lane of a panel: vectors are ordered [G][units], so that a unit's gates
  // share a lane. -1: padding.
  auto source_of(int64_t block) const {
    return [H = p_.H, U = units(block), first = block * kUnits](int c, int lane) {
      const int64_t unit = (first + c % U) * W + lane;
      return unit < H ? c / U * H + unit : -1;
    };
  }

  // Steps whose W_ih x is computed at once: enough rows to pay for reading W_ih, few enough for the cache.
  int64_t window(const ResidentPlan& plan) const {
    const int64_t bytes_of_row = width() * sizeof(T) / plan.unit_slices;
    const int64_t rows = std::clamp<int64_t>((int64_t{256} << 10) / bytes_of_row, 16, 128);
    return std::clamp<int64_t>(rows * plan.row_chunks / std::max<int64_t>(1, p_.steps.B), 1, p_.steps.T);
  }

  void pack(int64_t n, int64_t block) {
    const Recurrence<T>& w = p_.recurrences[n];
    const int C = G * units(block);
    const auto source = source_of(block);
    if (packed_ih_ && !in_passing_)
      pack(w.weight_ih, p_.I, C, weights_ih_.get() + panel(n, block, operands_for<E>(p_.I)), source);
    if (packed_hh_)
      pack(w.weight_hh, p_.P, C, weights_hh_.get() + panel(n, block, operands_for<E>(p_.P)), source);
    T* out = bias_.get() + panel(n, block, 2);  // of gx, then of gh
    for (const T* bias : {w.bias_ih, w.bias_hh})
      for (int c = 0; c < C; ++c)
        for (int lane = 0; lane < W; ++lane)
          *out++ = bias && source(c, lane) >= 0 ? bias[source(c, lane)] : T(0);
  }

  // Calls f with where the values of a matrix are.
  template <class F>
  static void with_values(const Matrix<T>& w, const F& f) {
    if constexpr (kConverted) {
      f(w.narrow);
    } else {
      if constexpr (sizeof(T) == sizeof(float))
        if (w.narrow) return f(w.narrow);
      f(w.wide);
    }
  }
  template <class Row>
  static void pack(const Matrix<T>& w, int64_t K, int C, E* panel, const Row& row) {
    with_values(w, [&](const auto* values) { pack_rows(values, K, C, panel, row); });
  }

  // Rows of a times the weights of a block, plus its bias, as multiply() does it: by its panel, or by the
  // weights as they are if that is null.
  template <class Source, class Consume>
  void product(const Source& a, int64_t rows, const Matrix<T>& weights, const E* panel, int64_t K,
               int64_t block, const T* bias, T* out, const Consume& consume) const {
    const int C = G * units(block);
    if (panel) return multiply(a, rows, panel, operands_for<E>(K), C, bias, out, consume);
    with_values(weights, [&](const auto* values) {
      multiply_unpacked<E>(a, rows, values, K, C, source_of(block), bias, out, consume);
    });
  }

  // Where a slice of recurrence n has the operands of its rows from b on, if they are not the values
  // themselves.
  E* operands(int64_t n, int64_t slice, int64_t b) const {
    return operands_.get() + ((slice * p_.N + n) * p_.steps.B + b) * row_operands_;
  }

  int64_t rows_end(const Job& job, int64_t t) const { return std::min(job.b1, p_.steps.count(t)); }

  // The tiles of W_ih x of a block, [rows of a window, G * units, W], whose rows are those of its steps in
  // turn.
  T* gx(const Job& job, int64_t block) const {
    return gx_.get() +
           ((job.n * p_.steps.B + job.b0) * width() + block * kUnits * W * G * (job.b1 - job.b0)) * window_;
  }
  // W_hh h of a block, of a job with one row.
  T* gh_row(const Job& job, int64_t block) const {
    return gh_.get() + (job.n * p_.steps.B + job.b0) * width() + block * G * W;
  }
  int64_t rows_before(const Job& job, int64_t i) const {
    if (!p_.steps.offsets) return i % window_ * (job.b1 - job.b0);
    int64_t rows = 0;
    for (int64_t j = i - i % window_; j < i; ++j)
      rows += std::max<int64_t>(0, rows_end(job, layout_.time(job.n, j)) - job.b0);
    return rows;
  }

  // W_ih x + b_ih of the steps of a window from step i.
  void project_input(const Job& job, int64_t i, int64_t slice, Range blocks) const {
    const int64_t I = p_.I, n = job.n, B = p_.steps.B;
    const E** x = inputs_.get() + ((slice * p_.N + n) * B + job.b0) * window_;  // their rows of x
    int64_t rows = 0;
    for (const int64_t end = std::min(i + window_, p_.steps.T); i < end; ++i) {
      const int64_t t = layout_.time(n, i);
      const T* source = p_.x + (p_.steps.offsets ? p_.steps.offset(t) * p_.x_row : t * p_.x_step);
      for (int64_t b = job.b0; b < rows_end(job, t); ++b, ++rows) {
        const T* const row = source + b * p_.x_row + p_.recurrences[n].input;
        if constexpr (kConverted)
          x[rows] = convert(row, I, operands(n, slice, job.b0) + rows * operands_for<E>(I));
        else
          x[rows] = row;
      }
    }
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      const Matrix<T>& weights = p_.recurrences[n].weight_ih;
      E* const packed = !packed_ih_ ? nullptr
                        : in_passing_
                            ? weights_ih_.get() + (slice * p_.N + n) * G * kUnits * W * operands_for<E>(I)
                            : weights_ih_.get() + panel(n, block, operands_for<E>(I));
      if (in_passing_) pack(weights, I, G * units(block), packed, source_of(block));
      product(x, rows, weights, packed, I, block, bias_.get() + panel(n, block, 2), gx(job, block),
              [](int64_t, int64_t, const T*) {});
    }
  }

  // h of the rows [b0, b1) before a step, and the operands of these rows.
  struct Segment {
    Rows<const T> h;
    int64_t b0, b1;
    Rows<const E> operands;
  };
  Segment segment(int64_t n, int64_t slice, const Rows<const T>& h, int64_t b0, int64_t b1) const {
    if constexpr (kConverted) {
      for (int64_t b = b0; b < b1; ++b) convert(h[b], p_.P, operands(n, slice, b));
      return {h, b0, b1, {operands(n, slice, b0), row_operands_}};
    } else {
      return {h, b0, b1, {h[b0], h.ld}};
    }
  }

  void step(const Job& job, int64_t i, int64_t slice, Range blocks) const {
    const int64_t N = p_.N, P = p_.P, n = job.n, B = p_.steps.B;
    const int64_t t = layout_.time(n, i), first = p_.steps.offset(t), end = rows_end(job, t);
    if (job.b0 >= end) return;
    const auto before = layout_.before(n, t);
    const int64_t alive = std::clamp(before.alive, job.b0, end), row = rows_before(job, i);
    const Rows<const T> running{p_.y + (before.offset * N + n) * P, N * P};
    const Rows<const T> initial{p_.h0 + n * B * P, P};
    const Rows<T> out = hidden_rows(n, t);
    const Segment segments[] = {segment(n, slice, running, job.b0, alive),
                                segment(n, slice, initial, alive, end)};
    const bool one_row = kUnits == 1 && end - job.b0 == 1;
    for (int64_t j = 0; j < blocks.end - blocks.begin; ++j) {
      // To and fro: what does not fit the cache is at least partly in it when the next step begins there.
      const int64_t block = i % 2 ? blocks.end - 1 - j : blocks.begin + j, C = G * units(block);
      const T* bias = bias_.get() + panel(n, block, 2) + C * W;
      const T* gx_tiles = gx(job, block) + (row - job.b0) * C * W;
      const E* packed = packed_hh_ ? weights_hh_.get() + panel(n, block, operands_for<E>(P)) : nullptr;
      for (const auto& [h, b0, b1, operands] : segments)
        product(operands, b1 - b0, p_.recurrences[n].weight_hh, packed, P, block, bias,
                one_row ? gh_row(job, block) : nullptr,
                [&, h = h, b0 = b0](int64_t r, int64_t rows, const T* gh) {
                  const int64_t b = b0 + r;
                  if (!one_row) cells(Tile{n, block, first, b, rows, gx_tiles + b * C * W, gh}, h, out);
                });
    }
    if (one_row)
      cells_of_row(job, blocks, first, row, alive > job.b0 ? running[job.b0] : initial[job.b0], out[job.b0]);
    if (projected())
      for (int64_t j = 0; j < projection_.count(); ++j)
        multiply_panel(out[job.b0], out.ld, end - job.b0, projection_,
                       projections_.get() + n * projection_.size(), j, p_.y + ((first + job.b0) * N + n) * P,
                       N * P,
                       [&](V h, T* target, int lanes) { round_to(p_.rounding, h).store(target, lanes); });
  }

  // Where the cell's h goes: to y, or before a projection to the states kept, or to scratch.
  Rows<T> hidden_rows(int64_t n, int64_t t) const {
    const int64_t N = p_.N, H = p_.H;
    if (!projected()) return {p_.y + (p_.steps.offset(t) * N + n) * p_.P, N * p_.P};
    if (p_.kept[0]) return {p_.kept[0] + (p_.steps.offset(t) * N + n) * H, N * H};
    return {scratch_.get() + n * p_.steps.B * H, H};
  }

  // Rows [b, b + rows) of a block of units in a step that begins at row `first`: gx and gh, [rows, G * units,
  // W].
  struct Tile {
    int64_t n, block, first, b, rows;
    const T *gx, *gh;
  };

  // Where a vector of units has what the cell reads and writes; or how far that is from the next vector's.
  template <class Const, class Mutable>
  struct Places {
    Const gx, gh, h, param;
    Mutable out, saved;
    Array<Mutable, Cell::kStates> state, kept;
  };
  using Here = Places<const T*, T*>;
  using Step = Places<int64_t, int64_t>;

  void cells(const Tile& tile, const Rows<const T>& h, const Rows<T>& out) const {
    const int U = units(tile.block);
    const int64_t H = p_.H, N = p_.N, ld = G * U * W, b = tile.b, row = (tile.first + b) * N + tile.n;
    Step step{ld, ld, h.ld, 0, out.ld, N * p_.slots * H, {}, {}};
    for (int s = 1; s < Cell::kStates; ++s) step.state[s] = H, step.kept[s] = N * H;
    for (int u = 0; u < U; ++u) {
      const int64_t unit = (tile.block * kUnits + u) * W, at = (tile.n * p_.steps.B + b) * H + unit;
      Here here{tile.gx + u * W, tile.gh + u * W, h[b] + unit, nullptr, out[b] + unit, nullptr, {}, {}};
      if constexpr (params_of<Cell> > 0) here.param = p_.recurrences[tile.n].param + unit;
      if (p_.gates) here.saved = p_.gates + row * p_.slots * H + unit;
      for (int s = 1; s < Cell::kStates; ++s) {
        here.state[s] = p_.state[s] + at;
        here.kept[s] = p_.kept[s] ? p_.kept[s] + row * H + unit : nullptr;
      }
      if (H - unit >= W)
        run_cells(here, step, U, tile.rows, std::integral_constant<int, W>());
      else
        run_cells(here, step, U, tile.rows, static_cast<int>(H - unit));
    }
  }

  // The cells of a job with one row, which has no second row to run them in pairs with: vectors of units take
  // the place of rows.
  void cells_of_row(const Job& job, Range blocks, int64_t first, int64_t gx_row, const T* h, T* out) const {
    const int64_t H = p_.H, n = job.n, b = job.b0, ld = G * W, unit = blocks.begin * W;
    const int64_t state = (n * p_.steps.B + b) * H + unit, row = (first + b) * p_.N + n;
    const int64_t rows = (job.b1 - job.b0) * window_;
    Step step{ld * rows, ld, W, W, W, W, {}, {}};
    Here here{gx(job, blocks.begin) + gx_row * ld,
              gh_row(job, blocks.begin),
              h + unit,
              nullptr,
              out + unit,
              nullptr,
              {},
              {}};
    if constexpr (params_of<Cell> > 0) here.param = p_.recurrences[n].param + unit;
    if (p_.gates) here.saved = p_.gates + row * p_.slots * H + unit;
    for (int s = 1; s < Cell::kStates; ++s) {
      step.state[s] = step.kept[s] = W;
      here.state[s] = p_.state[s] + state;
      here.kept[s] = p_.kept[s] ? p_.kept[s] + row * H + unit : nullptr;
    }
    const int64_t whole = std::min(blocks.end, H / W) - blocks.begin;
    run_cells(here, step, 1, whole, std::integral_constant<int, W>());
    if (blocks.end * W <= H) return;
    advance(here, step, whole);
    run_cells(here, step, 1, 1, static_cast<int>(H % W));
  }

  // Two at a time, as long as there are. `lanes` is a constant where a vector is whole: nothing is decided
  // then.
  template <class Lanes>
  void run_cells(Here here, const Step& step, int U, int64_t count, Lanes lanes) const {
    for (; count > 1; count -= 2) {
      run_cell<Pair<T>>(here, step, U, lanes);
      advance(here, step, 2);
    }
    if (count > 0) run_cell<V>(here, step, U, lanes);
  }

  static void advance(Here& here, const Step& step, int64_t count) {
    here.gx += count * step.gx;
    here.gh += count * step.gh;
    here.h += count * step.h;
    here.out += count * step.out;
    if constexpr (params_of<Cell> > 0) here.param += count * step.param;
    if (here.saved) here.saved += count * step.saved;
    for (int s = 1; s < Cell::kStates; ++s) {
      here.state[s] += count * step.state[s];
      if (here.kept[s]) here.kept[s] += count * step.kept[s];
    }
  }

  template <class Vector, class Lanes>
  FUSEDRNN_HD void run_cell(const Here& here, const Step& step, int U, Lanes lanes) const {
    static_assert(CellOn<Cell, Vector>);
    Array<Vector, G> gx, gh;
    for (int g = 0; g < G; ++g) {
      gx[g] = Vector::load_rows(here.gx + g * U * W, step.gx, W);
      gh[g] = Vector::load_rows(here.gh + g * U * W, step.gh, W);
    }
    Array<Vector, Cell::kStates> state{};
    if constexpr (Cell::kReadsH) state[0] = Vector::load_rows(here.h, step.h, lanes);
    for (int s = 1; s < Cell::kStates; ++s) state[s] = Vector::load_rows(here.state[s], step.state[s], lanes);
    const Forward<Cell, Vector> next = step_of(here.param, step.param, lanes, gx, gh, state);
    const Vector hidden = projected() ? next.state[0] : round_to<T>(p_.rounding, next.state[0]);
    hidden.store_rows(here.out, step.out, lanes);
    for (int s = 1; s < Cell::kStates; ++s) {
      next.state[s].store_rows(here.state[s], step.state[s], lanes);
      if (here.kept[s]) next.state[s].store_rows(here.kept[s], step.kept[s], lanes);
    }
    if (here.saved)
      for (int j = 0; j < Cell::kSaved; ++j)
        next.saved[j].store_rows(here.saved + j * p_.H, step.saved, lanes);
  }

  template <class Vector>
  FUSEDRNN_HD Forward<Cell, Vector> step_of(const T* params, int64_t step, int lanes,
                                            const Array<Vector, G>& gx, const Array<Vector, G>& gh,
                                            const Array<Vector, Cell::kStates>& state) const {
    if constexpr (params_of<Cell> > 0) {
      Array<Vector, params_of<Cell>> param;
      for (int j = 0; j < params_of<Cell>; ++j) param[j] = Vector::load_rows(params + j * p_.H, step, lanes);
      return Cell::forward(gx, gh, state, param);
    } else {
      return Cell::forward(gx, gh, state);
    }
  }

  // The final h of a sequence is its row of y at its last step.
  void gather_final() const {
    const Steps& steps = p_.steps;
    for (int64_t n = 0; n < p_.N; ++n) {
      const bool reverse = p_.recurrences[n].reverse;
      for (int64_t t = reverse ? 0 : steps.T - 1, b = 0; b < steps.B; t += reverse ? 1 : -1)
        for (; b < steps.count(t); ++b)
          std::memcpy(p_.h_final + (n * steps.B + b) * p_.P, p_.y + ((steps.offset(t) + b) * p_.N + n) * p_.P,
                      p_.P * sizeof(T));
    }
  }

  const ForwardParams<T>& p_;
  const Layout<T> layout_;
  const int64_t unit_vectors_, blocks_, window_;
  // Panels of W_ih and W_hh are made beforehand; those of W_ih, if every one is used only once, in passing.
  const bool packed_ih_, packed_hh_, in_passing_;
  const Panels<T> projection_;  // [H] -> [P]
  const Buffer<E> weights_ih_, weights_hh_;
  const Buffer<T> bias_;
  const Buffer<const E*> inputs_;
  const int64_t row_operands_;  // of a row of the batch: x in a window and, when that is done, h
  const Buffer<E> operands_;
  const Buffer<T> gx_, gh_, projections_, scratch_;
};

}  // namespace fusedrnn::FUSEDRNN_ISA
