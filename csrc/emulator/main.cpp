// emulate: runs a persistent kernel in the emulator, with a plan of the caller's choice, on random inputs in
// guarded memory, under any number of schedules. Each run prints a line of JSON. The first is compared with
// the reference, the others with the first, byte by byte. Exits with 0; with 1 at the first run that is
// wrong, breaks a rule or gives up a wait; with 2 if it was called wrongly; with 66 at a race, if built for
// ThreadSanitizer.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "fibers.h"
#include "reference.h"
#include "runtime.h"

extern "C" {
__attribute__((visibility("default"))) const char* __tsan_default_options() {
  return "halt_on_error=1:exitcode=66:report_thread_leaks=0:atexit_sleep_ms=0";
}
__attribute__((visibility("default"))) const char* __asan_default_options() { return "detect_leaks=0"; }
}

namespace fusedrnn::emulator {
namespace {

using cuda::Number;

// "--name value", or "--name" alone.
class Arguments {
 public:
  Arguments(int count, char** words) {
    for (int i = 1; i < count; ++i) {
      if (std::strncmp(words[i], "--", 2)) throw std::invalid_argument(std::string("unexpected ") + words[i]);
      const bool valued = i + 1 < count && std::strncmp(words[i + 1], "--", 2);
      values_[words[i] + 2] = valued ? words[i + 1] : "1";
      i += valued;
    }
  }
  std::string text(const std::string& name, const std::string& otherwise) {
    const auto node = values_.extract(name);
    return node ? node.mapped() : otherwise;
  }
  int number(const std::string& name, int otherwise) {
    const std::string value = text(name, std::to_string(otherwise));
    char* end;
    const long number = std::strtol(value.c_str(), &end, 10);
    if (*end || number < 0 || number > 1 << 30)
      throw std::invalid_argument("--" + name + " cannot be " + value);
    return static_cast<int>(number);
  }
  // The first is the default.
  template <class T>
  T choice(const std::string& name, const std::vector<std::pair<const char*, T>>& choices) {
    const std::string value = text(name, choices[0].first);
    for (const auto& [word, meaning] : choices)
      if (value == word) return meaning;
    throw std::invalid_argument("--" + name + " cannot be " + value);
  }
  void check_all_used() const {
    if (!values_.empty()) throw std::invalid_argument("no such option: --" + values_.begin()->first);
  }

 private:
  std::map<std::string, std::string> values_;
};

// Numbers in memory as a kernel sees it: NaN until written, between guards that nobody may touch.
class Buffer {
 public:
  Buffer(Number number, int64_t count)
      : number_(number), count_(count), memory_(2 * kGuard + bytes(), '\xff') {
    forbid(memory_.data(), kGuard);
    forbid(end(), kGuard);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  char* begin() { return memory_.data() + kGuard; }
  char* end() { return begin() + bytes(); }
  Values values() {
    Values out;
    for (int64_t i = 0; i < count_; ++i)
      with(i, [&](auto& element) { out.push_back(device::widen(element)); });
    return out;
  }
  void set(const Values& values) {
    for (int64_t i = 0; i < count_; ++i)
      with(i, [&]<class E>(E& element) { element = device::narrow<E>(static_cast<float>(values[i])); });
  }
  bool guards_hold() {
    const auto hold = [](const char* guard) {
      return std::all_of(guard, guard + kGuard, [](char c) { return c == '\xff'; });
    };
    return kBoundsChecked || (hold(memory_.data()) && hold(end()));
  }

 private:
  static constexpr int64_t kGuard = 1024;

  int64_t bytes() const { return count_ * (number_ == Number::kFloat ? 4 : 2); }
  template <class F>
  void with(int64_t i, F f) {
    if (number_ == Number::kBFloat16)
      f(reinterpret_cast<device::BFloat16*>(begin())[i]);
    else if (number_ == Number::kHalf)
      f(reinterpret_cast<device::Half*>(begin())[i]);
    else
      f(reinterpret_cast<float*>(begin())[i]);
  }

  Number number_;
  int64_t count_;
  std::vector<char> memory_;
};

class Buffers {
 public:
  // Memory of that name, made when it is first asked for.
  void* add(const std::string& name, Number number, int64_t count) {
    return buffers_.try_emplace(name, number, count).first->second.begin();
  }
  void* add(const std::string& name, Number number, const Values& values) {
    const auto [found, made] = buffers_.try_emplace(name, number, std::ssize(values));
    if (made) found->second.set(values);
    return found->second.begin();
  }
  Values values(const std::string& name) { return buffers_.at(name).values(); }
  std::string bytes() {
    std::string out;
    for (auto& [name, buffer] : buffers_) out.append(buffer.begin(), buffer.end());
    return out;
  }
  void check_guards() {
    for (auto& [name, buffer] : buffers_)
      if (!buffer.guards_hold()) throw std::runtime_error("a store outside the bounds of " + name);
  }

 private:
  std::map<std::string, Buffer> buffers_;
};

Case random_case(Arguments& arguments) {
  Case c{};
  c.cell = arguments.choice<CellId>("cell", {{"lstm", CellId::kLstm},
                                             {"gru", CellId::kGru},
                                             {"rnn_tanh", CellId::kRnnTanh},
                                             {"rnn_relu", CellId::kRnnRelu}});
  std::tie(c.number, c.tf32) =
      arguments.choice<std::pair<Number, bool>>("dtype", {{"bf16", {Number::kBFloat16, false}},
                                                          {"fp16", {Number::kHalf, false}},
                                                          {"tf32", {Number::kFloat, true}},
                                                          {"fp32", {Number::kFloat, false}}});
  c.T = arguments.number("T", 4);
  c.B = arguments.number("B", 3);
  c.N = arguments.number("N", 1);
  c.H = arguments.number("H", 16);
  const bool reverse = arguments.number("reverse", 0);
  c.packed = arguments.number("packed", 0);
  if (!c.T || !c.B || !c.N || !c.H) throw std::invalid_argument("T, B, N and H cannot be 0");

  std::mt19937 engine(1);
  c.offsets.push_back(0);
  for (int64_t t = 0, alive = c.B; t < c.T; ++t) {
    if (c.packed && t) alive = std::uniform_int_distribution<int64_t>(1 + (alive - 1) / 2, alive)(engine);
    c.offsets.push_back(c.offsets.back() + alive);
  }
  for (int64_t n = 0; n < c.N; ++n) c.reverse.push_back(reverse && (c.N - n) % 2 == 1);  // the last, ...

  const int64_t gates = c.cell == CellId::kLstm ? 4 : c.cell == CellId::kGru ? 3 : 1;
  const auto fill = [&](Values& values, Number number, int64_t count, double bound) {
    std::uniform_real_distribution<double> uniform(-bound, bound);
    for (int64_t i = 0; i < count; ++i) values.push_back(rounded(number, uniform(engine)));
  };
  fill(c.weight, c.number, c.N * gates * c.H * c.H, 2 / std::sqrt(static_cast<double>(c.H)));
  fill(c.bias_ih, c.number, c.N * gates * c.H, 0.5);
  fill(c.bias_hh, c.number, c.N * gates * c.H, 0.5);
  fill(c.gx, Number::kFloat, c.rows() * c.N * gates * c.H, 1.5);
  fill(c.dy, c.number, c.rows() * c.N * c.H, 1);
  for (int s = 0; s < kMaxStates; ++s) {
    fill(c.state0[s], c.number, c.N * c.B * c.H, 1);
    fill(c.dfinal[s], c.number, c.N * c.B * c.H, 1);
  }
  return c;
}

PersistentPlan plan_of(Arguments& arguments, const Case& c) {
  PersistentPlan plan{};
  plan.exchange = arguments.choice<Exchange>(
      "exchange", {{"block", Exchange::kBlock}, {"cluster", Exchange::kCluster}, {"grid", Exchange::kGrid}});
  plan.unit_tiles = arguments.number("unit-tiles", 1);
  plan.k_splits = arguments.number("k-splits", 1);
  plan.batch_tiles = arguments.number("batch-tiles", 1);
  plan.slices = arguments.number("slices", static_cast<int>((c.H + plan.units() - 1) / plan.units()));
  const int64_t groups = c.N * ((c.B + plan.rows() - 1) / plan.rows());
  plan.groups = arguments.number("groups", static_cast<int>(groups));  // at once
  if (plan.units() * plan.slices < c.H || plan.batch_tiles < 1 || plan.batch_tiles > plan.k_splits ||
      plan.unit_tiles * plan.k_splits > kMaxWarps || plan.groups < 1 ||
      (plan.exchange == Exchange::kBlock && plan.slices > 1))
    throw std::invalid_argument("no kernel can have this plan");
  return plan;
}

// One pass of one cell on one case.
template <class Cell>
class Emulation {
 public:
  Emulation(Case c, const PersistentPlan& plan, bool backward)
      : c_(std::move(c)),
        plan_(plan),
        pass_(cuda::pass_of(c_.cell, c_.number, c_.tf32, backward)),
        backward_(backward) {
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

  // Returns what is wrong, or nothing. If waits are given up, the results mean nothing.
  std::string run(Comparison& compare, bool impatient) {
    Buffers out;
    std::vector<char> workspace(cuda::workspace_bytes(plan_, pass_, c_.N, c_.B));
    uint32_t status = 0;
    if (backward_)
      cuda::run(backward(out), plan_, workspace.data(), &status, nullptr);
    else
      cuda::run(forward(out), plan_, workspace.data(), &status, nullptr);
    in_.check_guards();
    out.check_guards();
    if (impatient) return "";
    if (status) return "a block waited for a peer that never came";
    if (!first_.empty()) return out.bytes() == first_ ? "" : "the result is not that of the first run";
    first_ = out.bytes();
    if (backward_)
      check_backward<Cell>(
          c_, {out.values("dgx"), kApart ? out.values("dgh") : Values{}, states("dstate0 ", out)}, compare);
    else
      check_forward<Cell>(
          c_, {out.values("y"), kStates > 1 ? out.values("kept") : Values{}, states("final_state ", out)},
          compare);
    return compare.worst();
  }

 private:
  static constexpr int kStates = Cell::kStates;
  static constexpr bool kApart = !Cell::kSameGates;

  std::array<Values, kMaxStates> states(const std::string& name, Buffers& out) {
    std::array<Values, kMaxStates> values;
    for (int s = 0; s < kStates; ++s) values[s] = out.values(name + std::to_string(s));
    return values;
  }

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
    call.gx = in_.add("gx", Number::kFloat, c_.gx);
    for (int s = 0; s < kStates; ++s)
      call.state0[s] = in_.add("state0 " + std::to_string(s), c_.number, c_.state0[s]);
    return call;
  }

  cuda::Forward forward(Buffers& out) {
    const int64_t all = c_.rows() * c_.N * c_.H;
    auto call = common<cuda::Forward>();
    call.y = out.add("y", c_.number, all);
    if (kStates > 1) call.kept[1] = out.add("kept", Number::kFloat, all);
    for (int s = 0; s < kStates; ++s)
      call.final_state[s] = out.add("final_state " + std::to_string(s), c_.number, c_.N * c_.B * c_.H);
    return call;
  }

  cuda::Backward backward(Buffers& out) {
    const int64_t gates = c_.rows() * c_.N * c_.H * Cell::kGates;
    auto call = common<cuda::Backward>();
    if (kApart) call.gh = in_.add("gh", Number::kFloat, c_.gh);
    if (Cell::kSaved == 0) call.gx = nullptr;
    call.h_previous = in_.add("h_previous", c_.number, c_.h_previous);
    call.y = in_.add("y", c_.number, c_.y);
    if (kStates > 1) call.kept[1] = in_.add("kept", Number::kFloat, c_.kept);
    call.dy = in_.add("dy", c_.number, c_.dy);
    call.dgx = out.add("dgx", c_.number, gates);
    if (kApart) call.dgh = out.add("dgh", c_.number, gates);
    for (int s = 0; s < kStates; ++s) {
      call.dfinal[s] = in_.add("dfinal " + std::to_string(s), c_.number, c_.dfinal[s]);
      call.dstate0[s] = out.add("dstate0 " + std::to_string(s), c_.number, c_.N * c_.B * c_.H);
    }
    return call;
  }

  Case c_;
  PersistentPlan plan_;
  PersistentPass pass_;
  bool backward_;
  Buffers in_;
  std::vector<cuda::Weights> weights_;
  std::string first_;  // the outputs of the first run
};

std::string json(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += c;
  }
  return out + '"';
}

std::string json(const std::vector<std::string>& texts) {
  std::string out;
  for (const std::string& text : texts) out += (out.empty() ? "" : ", ") + json(text);
  return '[' + out + ']';
}

const std::vector<std::pair<const char*, Order>> kOrders = {{"round_robin", Order::kRoundRobin},
                                                            {"random", Order::kRandom},
                                                            {"starved_block", Order::kStarvedBlock},
                                                            {"starved_warp", Order::kStarvedWarp}};

struct Schedules {
  int seeds;
  std::vector<std::pair<const char*, Order>> orders;
  std::string without;
  bool weakened, impatient;
};

Schedules schedules_of(Arguments& arguments) {
  Schedules schedules{arguments.number("seeds", 1),
                      {},
                      arguments.text("without", ""),
                      arguments.number("weakened", 0) != 0,
                      arguments.number("impatient", 0) != 0};
  const std::string order = arguments.text("order", "all");
  for (const auto& candidate : kOrders)
    if (order == "all" || order == candidate.first) schedules.orders.push_back(candidate);
  if (schedules.orders.empty()) throw std::invalid_argument("--order cannot be " + order);
  return schedules;
}

// Whether all went well.
template <class Cell>
bool emulate(const Case& c, const PersistentPlan& plan, bool backward, const Schedules& schedules) {
  Emulation<Cell> emulation(c, plan, backward);
  Comparison compare(c.number);
  for (int seed = 0; seed < schedules.seeds; ++seed)
    for (const auto& [order_name, order] : schedules.orders) {
      configure(
          {static_cast<uint64_t>(seed), order, schedules.without, schedules.weakened, schedules.impatient});
      std::string error;
      try {
        error = emulation.run(compare, schedules.impatient);
      } catch (const std::runtime_error& broken) {
        error = broken.what();
      }
      const std::vector<std::string> expired = take_expired();
      const bool ok = error.empty() && (expired.empty() || schedules.impatient);
      std::printf("{\"ok\": %s, \"seed\": %d, \"order\": \"%s\", \"error\": %s, ", ok ? "true" : "false",
                  seed, order_name, error.empty() ? "null" : json(error).c_str());
      std::printf("\"max_error\": %.3g, \"expired\": %s}\n", std::min(compare.max_error(), 1e300),
                  json(expired).c_str());
      std::fflush(stdout);  // before a sanitizer ends the process
      if (!ok) return false;
    }
  return true;
}

int main(int count, char** words) {
  Arguments arguments(count, words);
  const Case c = random_case(arguments);
  const PersistentPlan plan = plan_of(arguments, c);
  const bool backward = arguments.choice<bool>("pass", {{"forward", false}, {"backward", true}});
  const Schedules schedules = schedules_of(arguments);
  const bool list_sites = arguments.number("list-sites", 0);
  arguments.check_all_used();

  bool ok = false;
  switch (c.cell) {
    case CellId::kLstm:
      ok = emulate<Lstm>(c, plan, backward, schedules);
      break;
    case CellId::kGru:
      ok = emulate<Gru>(c, plan, backward, schedules);
      break;
    case CellId::kRnnTanh:
      ok = emulate<RnnTanh>(c, plan, backward, schedules);
      break;
    case CellId::kRnnRelu:
      ok = emulate<RnnRelu>(c, plan, backward, schedules);
      break;
  }
  const auto is_without = [&](const std::string& site) { return site.starts_with(schedules.without + ' '); };
  const std::vector<std::string> visited = sites();
  if (!schedules.without.empty() && std::none_of(visited.begin(), visited.end(), is_without))
    throw std::invalid_argument("nothing that orders memory was run at " + schedules.without);
  if (list_sites) std::printf("{\"sites\": %s}\n", json(visited).c_str());
  return ok ? 0 : 1;
}

}  // namespace
}  // namespace fusedrnn::emulator

int main(int count, char** words) {
  try {
    return fusedrnn::emulator::main(count, words);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "emulate: %s\n", error.what());
    return 2;
  }
}
