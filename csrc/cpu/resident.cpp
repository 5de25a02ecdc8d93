// The resident schedule: weights packed once into panels that stay in cache for the whole sequence, all gates
// of a vector of units in one tile of accumulators, and the cell run on those registers.
//
// Work is cut by recurrence and by chunks of the batch, which never meet. Where a chunk would be too small,
// the hidden units are cut instead, and the workers exchange h (backward: dgates) once a step.
#include "../cells/gru.h"
#include "../cells/lstm.h"
#include "../cells/rnn.h"
#include "kernels.h"
#include "product.h"
#include "sync.h"

namespace fusedrnn::FUSEDRNN_ISA {
namespace {

template <class F>
void parallel_for(const ThreadPool& pool, int64_t n, const F& f) {
  pool.parallel_for(
      n,
      [](int64_t begin, int64_t end, void* context) {
        for (int64_t i = begin; i < end; ++i) (*static_cast<const F*>(context))(i);
      },
      const_cast<void*>(static_cast<const void*>(&f)));
}

template <class T>
FUSEDRNN_HD Simd<T> round_to(Rounding rounding, Simd<T> x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (rounding == Rounding::kBFloat16) return round_to_bfloat16(x);
    if (rounding == Rounding::kHalf) return round_to_half(x);
  }
  return x;
}

// Rows of a matrix: row b begins at p + b * ld.
template <class T>
struct Rows {
  T* p;
  int64_t ld;
  T* operator[](int64_t b) const { return p + b * ld; }
};

// Rows [b0, b1) of the batch, whose h before a step is in h.
template <class T>
struct SegmentOf {
  Rows<const T> h;
  int64_t b0, b1;
};

// One worker's share: rows [b0, b1) of recurrence n, and the slice it owns.
struct Job {
  int64_t n, b0, b1, own;
};

// What forward and backward have in common: the order of time, the rows of a step, the cut into jobs.
template <class T>
struct Layout {
  Steps steps;
  int64_t N;
  const Recurrence<T>* recurrences;
  const ResidentPlan& plan;

  int64_t time(int64_t n, int64_t i) const { return recurrences[n].reverse ? steps.T - 1 - i : i; }

  // The row a step starts from for sequences [0, before): those alive at the step before; the others start
  // now.
  struct Before {
    int64_t offset, alive;
  };
  Before before(int64_t n, int64_t t) const {
    const int64_t s = recurrences[n].reverse ? t + 1 : t - 1;
    if (s < 0 || s >= steps.T) return {0, 0};
    return {steps.offset(s), steps.count(s)};
  }

  int64_t groups() const { return N * plan.row_chunks; }
  Job job(int64_t i) const {
    const int64_t group = i / plan.unit_slices, chunk = group % plan.row_chunks;
    return {group / plan.row_chunks, plan.row_bounds[chunk], plan.row_bounds[chunk + 1],
            i % plan.unit_slices};
  }

  // Runs step(job, i, slice) for i in [0, count) of every group, in order within a group.
  template <class Step>
  void run(const ThreadPool& pool, int64_t count, const Step& step) const {
    Buffer<SliceSync> syncs(plan.unit_slices > 1 ? groups() : 0);
    if (plan.unit_slices > 1)
      for (int64_t g = 0; g < groups(); ++g) new (syncs.get() + g) SliceSync();
    parallel_for(pool, groups() * plan.unit_slices, [&](int64_t i) {
      const Job j = job(i);
      if (plan.unit_slices == 1)
        for (int64_t s = 0; s < count; ++s) step(j, s, 0);
      else
        syncs.get()[i / plan.unit_slices].run(count, plan.unit_slices, j.own,
                                              [&](int64_t s, int64_t slice) { step(j, s, slice); });
    });
  }

  // The items of [0, count) that belong to a slice.
  struct Range {
    int64_t begin, end;
  };
  Range slice_of(int64_t count, int64_t slice) const {
    return {count * slice / plan.unit_slices, count * (slice + 1) / plan.unit_slices};
  }
};

template <class Cell, class T>
class ForwardPass {
  using V = Simd<T>;
  static_assert(CellOn<Cell, V>);
  static constexpr int W = V::kWidth, G = Cell::kGates;
  using Segment = SegmentOf<T>;
  // Vectors of units side by side: one where the gates fill the tile.
  static constexpr int kUnits = G == 1 ? kPanelVectors : 1;

 public:
  ForwardPass(const ForwardParams<T>& p, const ResidentPlan& plan, const ThreadPool& pool)
      : p_(p),
        layout_{p.steps, p.N, p.recurrences, plan},
        unit_vectors_((p.H + W - 1) / W),
        blocks_((unit_vectors_ + kUnits - 1) / kUnits),
        projection_{p.P, p.H},
        weights_(p.N * unit_vectors_ * W * G * p.P),
        bias_(p.N * unit_vectors_ * W * G * 2),
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
      step(job, layout_.time(job.n, i), layout_.slice_of(blocks_, slice));
    });
    gather_final(pool);
  }

 private:
  bool projected() const { return p_.recurrences[0].weight_hr != nullptr; }
  int units(int64_t block) const {
    const int64_t left = unit_vectors_ - block * kUnits;
    return static_cast<int>(left < kUnits ? left : kUnits);
  }
  T* panel(int64_t n, int64_t block) const {
    return weights_.get() + (n * unit_vectors_ + block * kUnits) * W * G * p_.P;
  }
  T* bias(int64_t n, int64_t block) const {
    return bias_.get() + (n * unit_vectors_ + block * kUnits) * W * G * 2;
  }

  // The panel of a block of units: vectors ordered [G][units], so that a unit's gates share a lane.
  void pack(int64_t n, int64_t block) {
    const Recurrence<T>& w = p_.recurrences[n];
    const int U = units(block);
    const auto row = [&](int c, int lane) {
      const int64_t unit = (block * kUnits + c % U) * W + lane;
      return unit < p_.H ? (c / U) * p_.H + unit : -1;
    };
    pack_rows(w.weight_hh, p_.P, G * U, panel(n, block), row);
    T* out = bias(n, block);
    for (int c = 0; c < G * U; ++c)
      for (int lane = 0; lane < W; ++lane, ++out) {
        const int64_t source = row(c, lane);
        const T x = w.bias_ih && source >= 0 ? w.bias_ih[source] : T(0);
        const T h = w.bias_hh && source >= 0 ? w.bias_hh[source] : T(0);
        out[0] = Cell::kSameGates ? x + h : h;         // added to gh
        out[G * U * W] = Cell::kSameGates ? T(0) : x;  // added to gx
      }
  }

  void step(const Job& job, int64_t t, typename Layout<T>::Range blocks) const {
    const int64_t N = p_.N, P = p_.P, n = job.n, B = p_.steps.B, first = p_.steps.offset(t);
    const int64_t end = job.b1 < p_.steps.count(t) ? job.b1 : p_.steps.count(t);
    if (job.b0 >= end) return;
    const auto before = layout_.before(n, t);
    const int64_t alive = before.alive < job.b0 ? job.b0 : before.alive < end ? before.alive : end;
    const Rows<const T> running{p_.y + (before.offset * N + n) * P, N * P};
    const Rows<const T> initial{p_.h0 + n * B * P, P};
    const Rows<T> out = hidden_rows(n, t);
    for (int64_t block = blocks.begin; block < blocks.end; ++block)
      for (const auto& [h, b0, b1] : {Segment{running, job.b0, alive}, Segment{initial, alive, end}})
        multiply(
            h[b0], h.ld, b1 - b0, panel(n, block), P, G * units(block), bias(n, block),
            [&](int64_t r, int64_t rows, const T* gh) { cells(n, block, first, b0 + r, rows, gh, h, out); });
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

  // Runs the cell on a tile of the product: `rows` rows of the batch from b, and the units of a block.
  void cells(int64_t n, int64_t block, int64_t first, int64_t b, int64_t rows, const T* gh_tile,
             const Rows<const T>& h, const Rows<T>& out) const {
    const int U = units(block);
    const int64_t H = p_.H, N = p_.N, gate_row = N * p_.slots * H;
    const T* bias_x = bias(n, block) + G * U * W;
    for (int64_t r = b; r < b + rows; ++r, gh_tile += G * U * W)
      for (int u = 0; u < U; ++u) {
        const int64_t unit = (block * kUnits + u) * W;
        const int lanes = static_cast<int>(H - unit < W ? H - unit : W);
        T* gates = p_.gates + (first + r) * gate_row + n * p_.slots * H + unit;
        Array<V, G> gx, gh;
        for (int g = 0; g < G; ++g) {
          gx[g] = V::load(gates + g * H, lanes);
          if constexpr (!Cell::kSameGates) gx[g] = gx[g] + V::load(bias_x + (g * U + u) * W);
          gh[g] = V::load(gh_tile + (g * U + u) * W);
        }
        Array<V, Cell::kStates> state{};
        if constexpr (Cell::kReadsH) state[0] = V::load(h[r] + unit, lanes);
        const int64_t at = (n * p_.steps.B + r) * H + unit;
        for (int s = 1; s < Cell::kStates; ++s) state[s] = V::load(p_.state[s] + at, lanes);
        const Forward<Cell, V> next = Cell::forward(gx, gh, state);
        const V hidden = projected() ? next.state[0] : round_to(p_.rounding, next.state[0]);
        hidden.store(out[r] + unit, lanes);
        for (int s = 1; s < Cell::kStates; ++s) {
          next.state[s].store(p_.state[s] + at, lanes);
          if (p_.kept[s]) next.state[s].store(p_.kept[s] + ((first + r) * N + n) * H + unit, lanes);
        }
        if (p_.keep)
          for (int j = 0; j < Cell::kSaved; ++j) next.saved[j].store(gates + j * H, lanes);
      }
  }

  // The final h of a sequence is its row of y at its last step.
  void gather_final(const ThreadPool& pool) const {
    const Steps& steps = p_.steps;
    parallel_for(pool, p_.N, [&](int64_t n) {
      const bool reverse = p_.recurrences[n].reverse;
      for (int64_t t = reverse ? 0 : steps.T - 1, b = 0; b < steps.B; t += reverse ? 1 : -1)
        for (; b < steps.count(t); ++b)
          std::memcpy(p_.h_final + (n * steps.B + b) * p_.P, p_.y + ((steps.offset(t) + b) * p_.N + n) * p_.P,
                      p_.P * sizeof(T));
    });
  }

  const ForwardParams<T>& p_;
  const Layout<T> layout_;
  const int64_t unit_vectors_, blocks_;
  const Panels<T> projection_;  // [H] -> [P]
  const Buffer<T> weights_, bias_, projections_, scratch_;
};

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
        weights_(p.N * recurrent_.size()),
        projections_(projected() ? p.N * projection_.size() : 0),
        scratch_(projected() ? p.N * p.steps.B * p.H : 0) {
    parallel_for(pool, p.N * recurrent_.count(), [&](int64_t i) {
      const int64_t n = i / recurrent_.count();
      pack_natural(p_.recurrences[n].weight_hh, recurrent_, i % recurrent_.count(),
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
    for (int64_t j = panels.begin; j < panels.end; ++j)
      multiply_panel(dgh, row, end - job.b0, recurrent_, weights_.get() + n * recurrent_.size(), j, dh, p_.P,
                     [](V x, T* target, int lanes) { (V::load(target, lanes) + x).store(target, lanes); });
  }

  // The cell's backward for the units of the panels; what is left of dstate[0] is what did not go through gh.
  void differentiate(const Job& job, int64_t t, typename Layout<T>::Range panels) const {
    const int64_t n = job.n, N = p_.N, B = p_.steps.B, H = p_.H, P = p_.P;
    const int64_t end = rows_end(job, t), first = p_.steps.offset(t);
    if (job.b0 >= end) return;
    const auto before = layout_.before(n, t);
    if (projected()) unproject(job, t, end);
    const int64_t width = kPanelVectors * W;
    const int64_t unit_begin = projected() ? 0 : panels.begin * width;
    const int64_t unit_end = projected() || panels.end * width > H ? H : panels.end * width;
    for (int64_t b = job.b0; b < end; ++b) {
      const int64_t at = n * B + b, row = (first + b) * N + n;
      const bool starts = b >= before.alive;
      const int64_t source = (before.offset + b) * N + n;
      const T* h = starts ? p_.h0 + at * P : p_.y + source * P;
      const T* saved = p_.gates + row * p_.slots * H;
      for (int64_t unit = unit_begin; unit < unit_end; unit += W) {
        const int lanes = static_cast<int>(unit_end - unit < W ? unit_end - unit : W);
        Array<V, Cell::kStates> dnext{}, state{}, next{};
        if (projected()) {
          dnext[0] = V::load(scratch_.get() + at * H + unit, lanes);
          next[0] = V::load(p_.kept[0] + row * H + unit, lanes);
        } else {
          dnext[0] = V::load(p_.dstate[0] + at * P + unit, lanes);
          if (p_.dy) dnext[0] = dnext[0] + V::load(p_.dy + row * P + unit, lanes);
          next[0] = V::load(p_.y + row * P + unit, lanes);
          state[0] = V::load(h + unit, lanes);
        }
        for (int s = 1; s < Cell::kStates; ++s) {
          dnext[s] = V::load(p_.dstate[s] + at * H + unit, lanes);
          next[s] = V::load(p_.kept[s] + row * H + unit, lanes);
          state[s] = V::load(starts ? p_.state0[s] + at * H + unit : p_.kept[s] + source * H + unit, lanes);
        }
        Array<V, Cell::kSaved> values;
        for (int j = 0; j < Cell::kSaved; ++j) values[j] = V::load(saved + j * H + unit, lanes);
        const Backward<Cell, V> d = Cell::backward(dnext, values, state, next);
        for (int g = 0; g < G; ++g) {
          d.dgx[g].store(p_.dgx + (row * G + g) * H + unit, lanes);
          if constexpr (!Cell::kSameGates) d.dgh[g].store(p_.dgh + (row * G + g) * H + unit, lanes);
        }
        if (!projected()) d.dstate[0].store(p_.dstate[0] + at * P + unit, lanes);
        for (int s = 1; s < Cell::kStates; ++s) d.dstate[s].store(p_.dstate[s] + at * H + unit, lanes);
      }
    }
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
  const Buffer<T> weights_, projections_, scratch_;
};

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
  }
}

template <class T>
constexpr KernelsOf<T> kernels_of() {
  return {run<ForwardPass, T, ForwardParams<T>>, run<BackwardPass, T, BackwardParams<T>>};
}

void apply(const char* function, float* values, int64_t n) {
  using V = Simd<float>;
  V (*f)(V) = nullptr;
  if (!std::strcmp(function, "sigmoid")) f = [](V x) { return sigmoid(x); };
  if (!std::strcmp(function, "tanh")) f = [](V x) { return tanh(x); };
  if (!std::strcmp(function, "bfloat16")) f = [](V x) { return round_to_bfloat16(x); };
  if (!std::strcmp(function, "half")) f = [](V x) { return round_to_half(x); };
  for (int64_t i = 0; f && i < n; i += V::kWidth) {
    const int lanes = static_cast<int>(n - i < V::kWidth ? n - i : V::kWidth);
    f(V::load(values + i, lanes)).store(values + i, lanes);
  }
}

#define FUSEDRNN_STRING_(x) #x
#define FUSEDRNN_STRING(x) FUSEDRNN_STRING_(x)

}  // namespace

extern const Kernels kernels{FUSEDRNN_STRING(FUSEDRNN_ISA), kVectorBytes, kernels_of<float>(),
                             kernels_of<double>(), apply};

}  // namespace fusedrnn::FUSEDRNN_ISA
