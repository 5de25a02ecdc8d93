// Runs the kernels on a case, and compares what they give with the reference.
#pragma once

#include <array>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "../cuda/kernels.h"
#include "buffers.h"
#include "reference.h"

namespace fusedrnn::emulator {

struct Outcome {
  std::string error;  // what is wrong, or nothing
  bool given_up;      // says the status word: the results mean nothing
};

// One pass of one cell, with a persistent plan or, if there is none, step by step.
template <class Cell>
class Emulation {
 public:
  Emulation(Case c, const std::optional<PersistentPlan>& plan, bool backward)
      : c_(std::move(c)), plan_(plan), backward_(backward) {
    if (backward) record_forward<Cell>(c_);
    const int64_t gates = Cell::kGates * c_.H;
    const auto of = [&](const char* name, const Values& all, int64_t n, int64_t size) {
      return in_.add(name + std::to_string(n), c_.number,
                     {all.begin() + n * size, all.begin() + (n + 1) * size});
    };
    for (int64_t n = 0; n < c_.N; ++n)
      weights_.push_back({of("weight_hh ", c_.weight, n, gates * c_.H), of("bias_ih ", c_.bias_ih, n, gates),
                          of("bias_hh ", c_.bias_hh, n, gates), c_.reverse[n]});
  }

  Outcome run(Comparison& compare) {
    Buffers out;
    uint32_t status = 0;
    if (backward_)
      run_all(backward(out), out, status);
    else
      run_all(forward(out), out, status);
    in_.check_guards();
    out.check_guards();
    if (status) return {"", true};
    if (!first_.empty())
      return {out.bytes() == first_ ? "" : "the result is not that of the first run", false};
    first_ = out.bytes();
    if (backward_)
      check_backward<Cell>(c_,
                           {values("dgx", out), kApart ? values("dgh", out) : Values{},
                            values("h_previous", out), states("dstate0 ", out)},
                           compare);
    else
      check_forward<Cell>(
          c_, {values("y", out), kStates > 1 ? values("kept", out) : Values{}, states("final_state ", out)},
          compare);
    return {compare.worst(), false};
  }

 private:
  static constexpr int kStates = Cell::kStates, kGates = Cell::kGates;
  static constexpr bool kApart = !Cell::kSameGates;

  static Values values(const std::string& name, Buffers& out) { return out[name].values(); }
  static std::array<Values, kMaxStates> states(const std::string& name, Buffers& out) {
    std::array<Values, kMaxStates> all;
    for (int s = 0; s < kStates; ++s) all[s] = values(name + std::to_string(s), out);
    return all;
  }
  int64_t all_states() const { return c_.N * c_.B * c_.H; }

  template <class Call>
  Call common() {
    Call call{};
    call.cell = c_.cell;
    call.number = c_.number;
    call.tf32 = c_.tf32;
    call.steps = {c_.T, c_.B, c_.packed ? c_.offsets.data() : nullptr};
    call.N = c_.N;
    call.H = c_.H;
    call.weights = weights_.data();
    call.gx = in_.add("gx", c_.accumulated(), c_.gx);
    for (int s = 0; s < kStates; ++s)
      call.state0[s] = in_.add("state0 " + std::to_string(s), c_.number, c_.state0[s]);
    return call;
  }

  cuda::Forward forward(Buffers& out) {
    const int64_t all = c_.rows() * c_.N * c_.H;
    auto call = common<cuda::Forward>();
    call.y = out.add("y", c_.number, all);
    if (kStates > 1) call.kept[1] = out.add("kept", c_.accumulated(), all);
    for (int s = 0; s < kStates; ++s)
      call.final_state[s] = out.add("final_state " + std::to_string(s), c_.number, all_states());
    return call;
  }

  cuda::Backward backward(Buffers& out) {
    const int64_t gates = c_.rows() * c_.N * c_.H * kGates;
    auto call = common<cuda::Backward>();
    if (kApart) call.gh = in_.add("gh", c_.accumulated(), c_.gh);
    if (Cell::kSaved == 0) call.gx = nullptr;
    call.h_previous = out.add("h_previous", c_.number, c_.rows() * c_.N * c_.H);
    if (plan_) out["h_previous"].set(c_.h_previous);
    call.y = in_.add("y", c_.number, c_.y);
    if (kStates > 1) call.kept[1] = in_.add("kept", c_.accumulated(), c_.kept);
    call.dy = in_.add("dy", c_.number, c_.dy);
    call.dgx = out.add("dgx", c_.number, gates);
    if (kApart) call.dgh = out.add("dgh", c_.number, gates);
    for (int s = 0; s < kStates; ++s) {
      call.dfinal[s] = in_.add("dfinal " + std::to_string(s), c_.number, c_.dfinal[s]);
      call.dstate0[s] = out.add("dstate0 " + std::to_string(s), c_.number, all_states());
    }
    return call;
  }

  template <class Call>
  void run_all(const Call& call, Buffers& out, uint32_t& status) {
    if (!plan_) return run_steps(call, out);
    const PersistentPass pass = cuda::pass_of(c_.cell, c_.number, c_.tf32, backward_);
    Buffer workspace(cuda::Number::kFloat, cuda::workspace_bytes(*plan_, pass, c_.N, c_.B) / 4);
    std::fill(workspace.begin(), workspace.end(), 0);
    cuda::run(call, *plan_, workspace.begin(), &status, nullptr);
    if (!workspace.guards_hold()) throw std::runtime_error("a store outside the bounds of the workspace");
  }

  // Calls f(n, b, row) for each sequence alive at the step that recurrences start s-th, or end s-th.
  template <class F>
  void at_step(int64_t s, bool from_end, F f) {
    for (int64_t n = 0; n < c_.N; ++n) {
      const int64_t t = c_.reverse[n] != from_end ? c_.T - 1 - s : s;
      for (int64_t b = 0; b < c_.offsets[t + 1] - c_.offsets[t]; ++b) f(n, b, c_.offsets[t] + b);
    }
  }

  // The products between the steps are the caller's, here too. The helpers of the ops run as well.
  void run_steps(cuda::Forward call, Buffers& out) {
    upload_offsets(call, out);
    cuda::StepForward step{};
    Buffer gh(c_.accumulated(), all_states() * kGates), h(c_.number, all_states()),
        other(c_.accumulated(), all_states());
    Buffer* const state[] = {&h, &other};
    step.gh = gh.begin();
    for (int s = 0; s < kStates; ++s) {
      state[s]->set(c_.state0[s]);
      step.state[s] = state[s]->begin();
    }
    for (step.s = 0; step.s < c_.T; ++step.s) {
      const Values previous = h.values();
      at_step(step.s, false, [&](int64_t n, int64_t b, int64_t) {
        const int64_t at = c_.initial(n, b);
        const Values product = recurrent<Cell>(c_, n, {previous.begin() + at, previous.begin() + at + c_.H});
        for (int64_t i = 0; i < std::ssize(product); ++i) gh.set(at * kGates + i, product[i]);
      });
      cuda::run(call, step, nullptr);
    }
    for (int s = 0; s < kStates; ++s) out["final_state " + std::to_string(s)].set(state[s]->values());
    check_guards({&gh, &h, &other});
  }

  void run_steps(cuda::Backward call, Buffers& out) {
    upload_offsets(call, out);
    cuda::previous_rows(c_.number, call.steps, c_.rows(), c_.N, c_.H, weights_.data(), call.state0[0], call.y,
                        const_cast<void*>(call.h_previous), nullptr);
    cuda::StepBackward step{};
    Buffer dh(c_.accumulated(), all_states()), first(c_.accumulated(), all_states()),
        second(c_.accumulated(), all_states());
    Buffer* const dstate[] = {&first, &second};
    step.dh = dh.begin();
    dh.set(Values(all_states()));
    for (int s = 0; s < kStates; ++s) {
      dstate[s]->set(c_.dfinal[s]);
      step.dstate[s] = dstate[s]->begin();
    }
    for (step.s = 0; step.s < c_.T; ++step.s) {
      cuda::run(call, step, nullptr);
      const Values dgh = values(kApart ? "dgh" : "dgx", out);
      at_step(step.s, true, [&](int64_t n, int64_t b, int64_t row) {
        for (int64_t unit = 0; unit < c_.H; ++unit)
          dh.set(c_.initial(n, b) + unit,
                 recurrent_backward<Cell>(c_, n, unit, &dgh[c_.index(row, n) * kGates]));
      });
    }
    cuda::run(call, step, nullptr);
    check_guards({&dh, &first, &second});
  }

  template <class Call>
  void upload_offsets(Call& call, Buffers& out) {
    if (!c_.packed) return;
    auto* offsets = static_cast<int64_t*>(out.add("offsets", cuda::Number::kDouble, c_.T + 1));
    cuda::upload(c_.offsets.data(), c_.T + 1, offsets, nullptr);
    call.steps.offsets = offsets;
  }

  static void check_guards(std::initializer_list<Buffer*> buffers) {
    for (Buffer* buffer : buffers)
      if (!buffer->guards_hold())
        throw std::runtime_error("a store outside the bounds of what a step updates");
  }

  Case c_;
  std::optional<PersistentPlan> plan_;
  bool backward_;
  Buffers in_;
  std::vector<cuda::Weights> weights_;
  std::string first_;  // the outputs of the first run that has any
};

}  // namespace fusedrnn::emulator
