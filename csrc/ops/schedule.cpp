#include "schedule.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "ops.h"

namespace fusedrnn::cuda {
namespace {

constexpr const char* kExchanges[] = {"block", "cluster", "grid"};  // in the order of Exchange

std::string describe(const PersistentPlan& plan) {
  return std::string(kExchanges[static_cast<int>(plan.exchange)]) + " of " + std::to_string(plan.slices) +
         (plan.slices == 1 ? " slice" : " slices") + ", " + std::to_string(plan.units()) + " units and " +
         std::to_string(plan.rows()) + " sequences each";
}

std::string describe(const Call& call, bool backward) {
  return std::string(call.cell.name) + (backward ? " backward" : " forward");
}

// What FUSEDRNN_SCHEDULE demands, read at every call: a schedule or an exchange by name, and of an exchange
// also a certain plan, as "cluster:8,2,4,1" with its slices, unit tiles, K splits and batch tiles.
struct Demand {
  std::string text;
  bool stepwise = false;
  std::optional<Exchange> exchange = {};
  std::optional<PersistentPlan> plan = {};
};

Demand demanded() {
  const char* value = std::getenv("FUSEDRNN_SCHEDULE");
  Demand demand{value ? value : ""};
  if (demand.text.empty()) return demand;
  demand.stepwise = demand.text == "stepwise";
  if (demand.stepwise) return demand;
  const size_t colon = demand.text.find(':');
  for (int i = 0; i < 3; ++i)
    if (demand.text.substr(0, colon) == kExchanges[i]) demand.exchange = static_cast<Exchange>(i);
  bool understood = demand.exchange.has_value();
  if (understood && colon != std::string::npos) {
    PersistentPlan plan{};
    plan.exchange = *demand.exchange;
    int read = 0;
    understood = std::sscanf(demand.text.c_str() + colon, ":%d,%d,%d,%d%n", &plan.slices, &plan.unit_tiles,
                             &plan.k_splits, &plan.batch_tiles, &read) == 4 &&
                 colon + read == demand.text.size();
    demand.plan = plan;
  }
  STD_TORCH_CHECK(
      understood, "FUSEDRNN_SCHEDULE=", demand.text,
      ": choose stepwise, block, cluster or grid, or of an exchange a plan, as in cluster:8,2,4,1 "
      "(slices, unit tiles, K splits, batch tiles)");
  return demand;
}

// torch's own log is out of reach of the stable ABI.
void log_once(const std::string& line) {
  static std::mutex mutex;
  static std::set<std::string> said;
  const std::lock_guard lock(mutex);
  if (said.insert(line).second) std::fprintf(stderr, "fusedrnn: %s\n", line.c_str());
}

// The last persistent launch on each device, for the message of one that failed.
struct Launches {
  std::mutex mutex;
  std::map<int, std::string> last;
};

Launches& launches() {
  static Launches all;
  return all;
}

struct Choice {
  std::optional<PersistentPlan> plan = {};
  bool refused = false;  // a better plan was, by the device
  std::string why = {};  // it was refused, or there is no plan
};

Choice choose(const Call& call, bool backward, const Demand& demand) {
  const Number number = number_of(call.dtype);
  const GpuProblem problem{pass_of(call.id, number, call.tf32, backward), call.N, call.B, call.H};
  const GpuDevice device = device_limits();
  std::vector<PersistentPlan> plans = plan_persistent(problem, device);
  if (demand.plan) {
    plans = {*demand.plan};
    if (!complete(plans[0], problem, device)) plans.clear();
  }
  Choice choice{.why = "no such plan fits this device and hidden size " + std::to_string(call.H)};
  if (!demand.exchange && !plans.empty() && stepwise_is_faster(plans.front(), problem, device)) return choice;
  for (const PersistentPlan& plan : plans) {
    if (demand.exchange && plan.exchange != *demand.exchange) continue;
    if (resident(plan, backward, call.id, number, call.tf32)) {
      choice.plan = plan;
      break;
    }
    if (!choice.refused) choice.why = "this device cannot keep a " + describe(plan) + " resident";
    choice.refused = true;
  }
  return choice;
}

// Choosing takes as long as some dozen steps: a problem that was met before has its answer.
Choice known_choice(const Call& call, bool backward, const Demand& demand, const Place& place) {
  using Key = std::tuple<int, CellId, ScalarType, bool, bool, int64_t, int64_t, int64_t, std::string>;
  static std::mutex mutex;
  static std::map<Key, Choice> known;
  const Key key{place.device, call.id, call.dtype, call.tf32, backward, call.N, call.B, call.H, demand.text};
  const std::lock_guard lock(mutex);
  if (const auto found = known.find(key); found != known.end()) return found->second;
  if (known.size() == 1024) known.clear();  // batches of any size
  return known[key] = choose(call, backward, demand);
}

template <class Pass>
void run_persistent(const Call& call, const Pass& pass, bool backward, const PersistentPlan& plan,
                    const Place& place) {
  {
    const std::lock_guard lock(launches().mutex);
    launches().last[place.device] = describe(call, backward) + ", " + describe(plan);
  }
  const PersistentPass kernel = pass_of(call.id, number_of(call.dtype), call.tf32, backward);
  const int64_t bytes = workspace_bytes(plan, kernel, call.N, call.B);
  std::optional<Tensor> workspace;
  if (bytes > 0) workspace = call.zeros({bytes}, ScalarType::Byte);
  run(pass, plan, workspace ? data(*workspace) : nullptr, status_word(place.device), place.stream);
  if (!kLibrary.on_cuda) check_earlier_launches(place);  // the emulator has run it to its end
}

}  // namespace

Number number_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return Number::kBFloat16;
    case ScalarType::Half:
      return Number::kHalf;
    case ScalarType::Float:
      return Number::kFloat;
    default:
      return Number::kDouble;
  }
}

std::optional<PersistentPlan> choose_plan(const Call& call, bool backward, const Place& place) {
  const Demand demand = demanded();
  if (demand.stepwise) return {};
  Choice choice;
  if (call.dtype == ScalarType::Double)
    choice.why = "float64 runs step by step";
  else if (call.projected())
    choice.why = "a projection runs step by step";
  else if (call.T > 1 || demand.exchange)  // a single step does not repay loading the weights
    choice = known_choice(call, backward, demand, place);
  STD_TORCH_CHECK(choice.plan || !demand.exchange, "FUSEDRNN_SCHEDULE=", demand.text, " cannot run ",
                  describe(call, backward), ": ", choice.why);
  if (choice.refused)
    log_once(describe(call, backward) + ": " + choice.why + "; it runs " +
             (choice.plan ? "as a " + describe(*choice.plan) : "step by step"));
  return choice.plan;
}

std::vector<int64_t> candidates(const Call& call, bool backward, const Place& place) {
  const std::optional<PersistentPlan> chosen = choose_plan(call, backward, place);
  const GpuDevice device = device_limits();
  std::vector<int64_t> figures{
      device.multiprocessors, device.shared_bytes, device.max_cluster(), device.cooperative, -1, 0};
  const Number number = number_of(call.dtype);
  if (number == Number::kDouble || call.projected()) return figures;
  const GpuProblem problem{pass_of(call.id, number, call.tf32, backward), call.N, call.B, call.H};
  figures[5] = std::llround(stepwise_cycles(problem, device));
  std::vector<PersistentPlan> plans = plan_persistent(problem, device);
  const auto is_chosen = [&](const PersistentPlan& plan) {
    const auto key = [](const PersistentPlan& p) {
      return std::tuple(p.exchange, p.slices, p.unit_tiles, p.k_splits, p.batch_tiles);
    };
    return chosen && key(plan) == key(*chosen);
  };
  // One that FUSEDRNN_SCHEDULE asks for by its tiles need not be among the planner's.
  if (chosen && std::none_of(plans.begin(), plans.end(), is_chosen)) plans.push_back(*chosen);
  for (const PersistentPlan& plan : plans) {
    constexpr int64_t kHead = 6, kFigures = 10;
    if (is_chosen(plan)) figures[4] = (std::ssize(figures) - kHead) / kFigures;
    const bool kept = resident(plan, backward, call.id, number, call.tf32);
    for (int64_t figure : {int64_t(plan.exchange), int64_t{plan.slices}, int64_t{plan.unit_tiles},
                           int64_t{plan.k_splits}, int64_t{plan.batch_tiles}, int64_t{plan.groups},
                           shared_layout(plan, problem.pass).bytes, register_bytes(plan, problem.pass),
                           int64_t{std::llround(cycles_of(plan, problem, device))}, int64_t{kept}})
      figures.push_back(figure);
  }
  return figures;
}

void launch(const Call& call, const Forward& forward, const PersistentPlan& plan, const Place& place) {
  run_persistent(call, forward, false, plan, place);
}

void launch(const Call& call, const Backward& backward, const PersistentPlan& plan, const Place& place) {
  run_persistent(call, backward, true, plan, place);
}

void check_earlier_launches(const Place& place) {
  if (std::atomic_ref(*status_word(place.device)).exchange(0) == 0) return;
  const std::lock_guard lock(launches().mutex);
  STD_TORCH_CHECK(false, "a persistent kernel (", launches().last[place.device],
                  ") waited for a block that never came; the results of that call are void; set "
                  "FUSEDRNN_SCHEDULE=stepwise");
}

}  // namespace fusedrnn::cuda
