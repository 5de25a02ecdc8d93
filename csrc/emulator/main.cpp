// emulate: runs a kernel in the emulator, with a plan of the caller's choice, on random inputs in guarded
// memory, under any number of schedules. Each run prints a line of JSON. The first is compared with the
// reference, the others with the first, byte by byte. Exits with 0; with 1 at the first run that is wrong,
// breaks a rule or gives up a wait; with 2 if it was called wrongly; with 66 at a race, if built for
// ThreadSanitizer.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "emulation.h"
#include "faults.h"
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
  bool has(const std::string& name) const { return values_.contains(name); }
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
                                                          {"fp32", {Number::kFloat, false}},
                                                          {"fp64", {Number::kDouble, false}}});
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
  fill(c.gx, c.accumulated(), c.rows() * c.N * gates * c.H, 1.5);
  fill(c.dy, c.number, c.rows() * c.N * c.H, 1);
  for (int s = 0; s < kMaxStates; ++s) {
    fill(c.state0[s], c.number, c.N * c.B * c.H, 1);
    fill(c.dfinal[s], c.number, c.N * c.B * c.H, 1);
  }
  return c;
}

// None: the stepwise schedule.
std::optional<PersistentPlan> plan_of(Arguments& arguments, const Case& c) {
  if (!arguments.choice<bool>("schedule", {{"persistent", true}, {"stepwise", false}})) return {};
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

std::string json(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += c;
  }
  return out + '"';
}

template <class T, class F>
std::string list(const std::vector<T>& items, F format) {
  std::string out;
  for (const T& item : items) out += (out.empty() ? "" : ", ") + format(item);
  return out;
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
  if (schedules.impatient && kRaceChecked)
    throw std::invalid_argument(
        "a wait that was given up orders nothing: --impatient is not for this program");
  const std::string order = arguments.text("order", "all");
  for (const auto& candidate : kOrders)
    if (order == "all" || order == candidate.first) schedules.orders.push_back(candidate);
  if (schedules.orders.empty()) throw std::invalid_argument("--order cannot be " + order);
  return schedules;
}

// Whether all runs went well.
bool run_all(const Schedules& schedules, const Comparison& compare, const std::function<Outcome()>& run) {
  for (int seed = 0; seed < schedules.seeds; ++seed)
    for (const auto& [order_name, order] : schedules.orders) {
      configure(
          {static_cast<uint64_t>(seed), order, schedules.without, schedules.weakened, schedules.impatient});
      Outcome outcome{};
      try {
        outcome = run();
      } catch (const std::runtime_error& broken) {
        outcome.error = broken.what();
      }
      const std::vector<std::string> expired = take_expired();
      if (outcome.given_up && !schedules.impatient)
        outcome.error = "a block waited for a peer that never came";
      const bool ok = outcome.error.empty() && (expired.empty() || schedules.impatient);
      std::printf("{\"ok\": %s, \"seed\": %d, \"order\": \"%s\", \"error\": %s, ", ok ? "true" : "false",
                  seed, order_name, outcome.error.empty() ? "null" : json(outcome.error).c_str());
      std::printf("\"max_error\": %.3g, \"given_up\": %s, \"expired\": [%s]}\n",
                  std::min(compare.max_error(), 1e300), outcome.given_up ? "true" : "false",
                  list(expired, json).c_str());
      std::fflush(stdout);  // before a sanitizer ends the process
      if (!ok) return false;
    }
  return true;
}

using Job = std::function<bool(const Schedules&)>;

template <class Cell>
Job job_of(const Case& c, const std::optional<PersistentPlan>& plan, bool backward) {
  return [=](const Schedules& schedules) {
    Emulation<Cell> emulation(c, plan, backward);
    Comparison compare(c.number);
    return run_all(schedules, compare, [&] { return emulation.run(compare); });
  };
}

Job job_of(Arguments& arguments) {
  if (arguments.has("fault")) {
    const faults::Fault fault = arguments.choice("fault", faults::kFaults);
    return [fault](const Schedules& schedules) {
      return run_all(schedules, Comparison(Number::kFloat), [fault] { return run_faulty(fault); });
    };
  }
  const Case c = random_case(arguments);
  const std::optional<PersistentPlan> plan = plan_of(arguments, c);
  const bool backward = arguments.choice<bool>("pass", {{"forward", false}, {"backward", true}});
  switch (c.cell) {
    case CellId::kLstm:
      return job_of<Lstm>(c, plan, backward);
    case CellId::kGru:
      return job_of<Gru>(c, plan, backward);
    case CellId::kRnnTanh:
      return job_of<RnnTanh>(c, plan, backward);
    case CellId::kRnnRelu:
      return job_of<RnnRelu>(c, plan, backward);
    case CellId::kLstmPeephole:
      break;
  }
  return {};
}

// That what was to be left out, or weakened, is something that was run.
void check_mutation(const Schedules& schedules) {
  if (schedules.without.empty()) return;
  for (const Operation& operation : sites()) {
    if (operation.site != schedules.without) continue;
    if (schedules.weakened && !operation.weakens)
      throw std::invalid_argument(operation.name + " has no weaker form");
    return;
  }
  throw std::invalid_argument("nothing that orders memory was run at " + schedules.without);
}

int main(int count, char** words) {
  Arguments arguments(count, words);
  const Job job = job_of(arguments);
  const Schedules schedules = schedules_of(arguments);
  const bool list_sites = arguments.number("list-sites", 0);
  arguments.check_all_used();

  const bool ok = job(schedules);
  check_mutation(schedules);
  const auto described = [](const Operation& operation) {
    return "{\"site\": " + json(operation.site) + ", \"operation\": " + json(operation.name) +
           ", \"weakens\": " + (operation.weakens ? "true}" : "false}");
  };
  if (list_sites) std::printf("{\"sites\": [%s]}\n", list(sites(), described).c_str());
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
