// The reverse sweep of the resident schedule: the cell's backward, and dh of the step before.
#pragma once

#include "schedule.h"

namespace fusedrnn::FUSEDRNN_ISA {

template <class Cell, class T>
class BackwardPass {
  using V = Simd<T>;
  static constexpr int W = V::kWidth, G = Cell::kGates;

 public:
  BackwardPass(const BackwardParams<T>& p, const ResidentPlan& plan, const ThreadPool& pool)
      : p_(p),
        layout_{p.steps, p.N, p.recurrences, plan},
        recurrent_{p.P, G * p.H},
        projection_{p.H, p.P},
        packed_(p.steps.B > 1 || p.P % W != 0),
        weights_(packed_ ? p.N * recurrent_.size() : 0),
        projections_(projected() ? p.N * projection_.size() : 0),
        scratch_(projected() ? p.N * p.steps.B * p.H : 0) {
    parallel_for(pool, packed_ ? p.N * recurrent_.count() : 0, [&](int64_t i) {
      const int64_t n = i / recurrent_.count();
      pack_natural(p_.recurrences[n].weight_hh.wide, recurrent_, i % recurrent_.count(),
                   weights_.get() + n * recurrent_.size());
    });
    if (projected())
      parallel_for(pool, p.N * projection_.count(), [&](int64_t i) {
        const int64_t n = i / projection_.count();
        pack_natural(p_.recurrences[n].weight_hr, projection_, i % projection_.count(),
                     projections_.get() + n * projection_.size());
      });
    // The product of a step needs the dgates of all units, the cell only its own units' dh: so a step's
    // product is taken up at the start of the next, and one hand-over a step is enough.
    const int64_t T_ = p.steps.T;
    layout_.run(pool, T_ + 1, [&](const Job& job, int64_t i, int64_t slice) {
      const auto panels = layout_.slice_of(recurrent_.count(), slice);
      if (i > 0) propagate(job, layout_.time(job.n, T_ - i), panels);
      if (i < T_) differentiate(job, layout_.time(job.n, T_ - 1 - i), panels);
    });
    if (p.h_previous) gather_previous(pool);
    if (p.dbias_ih) {
      const int64_t width = kPanelVectors * W, blocks = (G * p.H + width - 1) / width;
      parallel_for(pool, p.N * blocks, [&](int64_t i) { sum_rows(i / blocks, i % blocks * width); });
    }
  }

 private:
  bool projected() const { return p_.recurrences[0].weight_hr != nullptr; }
  int64_t rows_end(const Job& job, int64_t t) const {
    return job.b1 < p_.steps.count(t) ? job.b1 : p_.steps.count(t);
  }

  // dh of the step before: dstate[0] += dgh W_hh.
  void propagate(const Job& job, int64_t t, typename Layout<T>::Range panels) const {
    const int64_t n = job.n, end = rows_end(job, t), row = p_.N * G * p_.H;
    if (job.b0 >= end) return;
    const T* dgh = p_.dgh + (p_.steps.offset(t) + job.b0) * row + n * G * p_.H;
    T* dh = p_.dstate[0] + (n * p_.steps.B + job.b0) * p_.P;
    const auto add = [](V x, T* target, int lanes) { (V::load(target, lanes) + x).store(target, lanes); };
    if (!packed_) {
      const int64_t width = kPanelVectors * W, first = panels.begin * width;
      multiply_row(dgh, p_.recurrences[n].weight_hh.wide + first, p_.P, G * p_.H,
                   std::min(p_.P, panels.end * width) - first, dh + first, add);
    }
    for (int64_t j = panels.begin; packed_ && j < panels.end; ++j)
      multiply_panel(dgh, row, end - job.b0, recurrent_, weights_.get() + n * recurrent_.size(), j, dh, p_.P,
                     add);
  }

  // The cell's backward for the units of the panels; what is left of dstate[0] is what did not go through gh.
  void differentiate(const Job& job, int64_t t, typename Layout<T>::Range panels) const {
    const int64_t n = job.n, N = p_.N, B = p_.steps.B, H = p_.H;
    const int64_t end = rows_end(job, t), first = p_.steps.offset(t);
    if (job.b0 >= end) return;
    const auto before = layout_.before(n, t);
    if (projected()) unproject(job, t, end);
    const int64_t width = kPanelVectors * W;
    const int64_t unit_begin = projected() ? 0 : panels.begin * width;
    const int64_t unit_end = projected() || panels.end * width > H ? H : panels.end * width;
    for (int64_t b = job.b0; b < end; ++b) {
      const int64_t source = (before.offset + b) * N + n;
      const Row at{n, n * B + b, (first + b) * N + n, b >= before.alive ? -1 : source};
      int64_t unit = unit_begin;
      for (; unit + 2 * W <= unit_end; unit += 2 * W) differentiate_units<Pair<T>>(at, unit, W);
      for (; unit < unit_end; unit += W)
        differentiate_units<V>(at, unit, static_cast<int>(unit_end - unit < W ? unit_end - unit : W));
    }
  }

  // A row of a step: its recurrence, its place among the states [N, B] and among the rows [rows, N], and that
  // of the step before, -1 for the first.
  struct Row {
    int64_t n, state, here, before;
  };

  // Of a vector of units or, if Vector is a Pair, two.
  template <class Vector>
  FUSEDRNN_HD void differentiate_units(const Row& at, int64_t unit, int lanes) const {
    const int64_t H = p_.H, P = p_.P;
    const auto load = [&](const T* p) { return Vector::load_rows(p + unit, W, lanes); };
    const auto store = [&](Vector x, T* p) { x.store_rows(p + unit, W, lanes); };
    Array<Vector, Cell::kStates> dnext{}, state{}, next{};
    if (projected()) {
      dnext[0] = load(scratch_.get() + at.state * H);
      next[0] = load(p_.kept[0] + at.here * H);
    } else {
      dnext[0] = load(p_.dstate[0] + at.state * P);
      if (p_.dy) dnext[0] = dnext[0] + load(p_.dy + at.here * P);
      next[0] = load(p_.y + at.here * P);
      state[0] = load(at.before < 0 ? p_.h0 + at.state * P : p_.y + at.before * P);
    }
    for (int s = 1; s < Cell::kStates; ++s) {
      dnext[s] = load(p_.dstate[s] + at.state * H);
      if (p_.dkept[s]) dnext[s] = dnext[s] + load(p_.dkept[s] + at.here * H);
      next[s] = load(p_.kept[s] + at.here * H);
      state[s] = load(at.before < 0 ? p_.state0[s] + at.state * H : p_.kept[s] + at.before * H);
    }
    Array<Vector, Cell::kSaved> saved;
    for (int j = 0; j < Cell::kSaved; ++j) saved[j] = load(p_.gates + (at.here * p_.slots + j) * H);
    Backward<Cell, Vector> d;
    if constexpr (constexpr int K = params_of<Cell>; K > 0) {
      Array<Vector, K> param;
      for (int j = 0; j < K; ++j) param[j] = load(p_.recurrences[at.n].param + j * H);
      d = Cell::backward(dnext, saved, state, next, param);
      for (int j = 0; j < K; ++j) {  // added up for each sequence apart
        T* sum = p_.dparam + (at.state * K + j) * H;
        store(load(sum) + d.dparam[j], sum);
      }
    } else {
      d = Cell::backward(dnext, saved, state, next);
    }
    for (int g = 0; g < G; ++g) {
      store(d.dgx[g], p_.dgx + (at.here * G + g) * H);
      if constexpr (!Cell::kSameGates) store(d.dgh[g], p_.dgh + (at.here * G + g) * H);
    }
    if (!projected()) store(d.dstate[0], p_.dstate[0] + at.state * P);
    for (int s = 1; s < Cell::kStates; ++s) store(d.dstate[s], p_.dstate[s] + at.state * H);
  }

  // Gradient of h before its projection, into scratch; of h after it, for W_hr, into dprojected.
  void unproject(const Job& job, int64_t t, int64_t end) const {
    const int64_t n = job.n, N = p_.N, B = p_.steps.B, H = p_.H, P = p_.P, first = p_.steps.offset(t);
    for (int64_t b = job.b0; b < end; ++b) {
      T* dh = p_.dstate[0] + (n * B + b) * P;
      const int64_t row = ((first + b) * N + n) * P;
      for (int64_t j = 0; j < P; ++j) {
        p_.dprojected[row + j] = p_.dy ? dh[j] + p_.dy[row + j] : dh[j];
        dh[j] = T(0);
      }
    }
    for (int64_t j = 0; j < projection_.count(); ++j)
      multiply_panel(p_.dprojected + ((first + job.b0) * N + n) * P, N * P, end - job.b0, projection_,
                     projections_.get() + n * projection_.size(), j, scratch_.get() + (n * B + job.b0) * H, H,
                     [](V x, T* target, int lanes) { x.store(target, lanes); });
  }

  // Gradients of the biases from column `first` on, as many as a panel has.
  void sum_rows(int64_t n, int64_t first) const {
    sum_rows(p_.dgx + n * G * p_.H + first, G * p_.H - first, p_.dbias_ih[n] + first);
    if constexpr (Cell::kSameGates)
      std::memcpy(p_.dbias_hh[n] + first, p_.dbias_ih[n] + first,
                  std::min<int64_t>(kPanelVectors * W, G * p_.H - first) * sizeof(T));
    else
      sum_rows(p_.dgh + n * G * p_.H + first, G * p_.H - first, p_.dbias_hh[n] + first);
  }

  // In parts, and parts of parts: a long sum loses digits.
  void sum_rows(const T* gates, int64_t columns, T* out) const {
    constexpr int64_t kPart = 16, kLevels = 3;
    const int64_t rows = p_.steps.rows(), ld = p_.N * G * p_.H;
    int lanes[kPanelVectors];
    for (int c = 0; c < kPanelVectors; ++c)
      lanes[c] = static_cast<int>(std::clamp<int64_t>(columns - c * W, 0, W));
    V sums[kLevels][kPanelVectors];
    for (auto& level : sums)
      for (V& sum : level) sum = V(T(0));
    const auto pass_on = [&](int level) {
      for (int c = 0; c < kPanelVectors; ++c) {
        sums[level + 1][c] = sums[level + 1][c] + sums[level][c];
        sums[level][c] = V(T(0));
      }
    };
    for (int64_t row = 0; row < rows;) {
      for (const int64_t end = std::min(rows, row + kPart); row < end; ++row)
        for (int c = 0; c < kPanelVectors; ++c)
          if (lanes[c] > 0) sums[0][c] = sums[0][c] + V::load(gates + row * ld + c * W, lanes[c]);
      pass_on(0);
      if (row % (kPart * kPart) == 0 || row == rows) pass_on(1);
    }
    for (int c = 0; c < kPanelVectors; ++c)
      if (lanes[c] > 0) sums[kLevels - 1][c].store(out + c * W, lanes[c]);
  }

  void gather_previous(const ThreadPool& pool) const {
    const int64_t N = p_.N, P = p_.P, B = p_.steps.B, T_ = p_.steps.T;
    const int64_t chunk = 16, chunks = (T_ + chunk - 1) / chunk;  // steps handed out at a time
    parallel_for(pool, chunks, [&](int64_t i) {
      for (int64_t t = i * chunk; t < (i + 1) * chunk && t < T_; ++t)
        for (int64_t n = 0; n < N; ++n) {
          const auto before = layout_.before(n, t);
          for (int64_t b = 0; b < p_.steps.count(t); ++b)
            std::memcpy(p_.h_previous + ((p_.steps.offset(t) + b) * N + n) * P,
                        b < before.alive ? p_.y + ((before.offset + b) * N + n) * P : p_.h0 + (n * B + b) * P,
                        P * sizeof(T));
        }
    });
  }

  const BackwardParams<T>& p_;
  const Layout<T> layout_;
  const Panels<T> recurrent_;   // [G*H] -> [P]
  const Panels<T> projection_;  // [P] -> [H]
  const bool packed_;           // one row reads W_hh but once a step, and as fast where it is
  const Buffer<T> weights_, projections_, scratch_;
};

}  // namespace fusedrnn::FUSEDRNN_ISA
