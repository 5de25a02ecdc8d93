#include "schedule.h"

#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <set>
#include <string>
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

// What FUSEDRNN_SCHEDULE demands, read at every call.
struct Demand {
  std::string name;
  bool stepwise = false;
  std::optional<Exchange> exchange = {};
};

Demand demanded() {
  const char* value = std::getenv("FUSEDRNN_SCHEDULE");
  const std::string name = value ? value : "";
  if (name.empty()) return {};
  if (name == "stepwise") return {name, true};
  for (int i = 0; i < 3; ++i)
    if (name == kExchanges[i]) return {name, false, static_cast<Exchange>(i)};
  STD_TORCH_CHECK(false, "FUSEDRNN_SCHEDULE=", name, ": choose stepwise, block, cluster or grid");
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

Choice choose(const Call& call, bool backward, std::optional<Exchange> demanded) {
  const Number number = number_of(call.dtype);
  const GpuProblem problem{pass_of(call.id, number, call.tf32, backward), call.N, call.B, call.H};
  const GpuDevice device = device_limits();
  const std::vector<PersistentPlan> plans = plan_persistent(problem, device);
  Choice choice{.why = "no such plan fits this device and hidden size " + std::to_string(call.H)};
  if (!demanded && !plans.empty() && stepwise_is_faster(plans.front(), problem, device)) return choice;
  for (const PersistentPlan& plan : plans) {
    if (demanded && plan.exchange != *demanded) continue;
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
Choice known_choice(const Call& call, bool backward, std::optional<Exchange> demanded, const Place& place) {
  static std::mutex mutex;
  static std::map<std::array<int64_t, 9>, Choice> known;
  const std::array<int64_t, 9> key{place.device,
                                   static_cast<int64_t>(call.id),
                                   static_cast<int64_t>(call.dtype),
                                   call.tf32,
                                   backward,
                                   demanded ? static_cast<int64_t>(*demanded) : -1,
                                   call.N,
                                   call.B,
                                   call.H};
  const std::lock_guard lock(mutex);
  if (const auto found = known.find(key); found != known.end()) return found->second;
  if (known.size() == 1024) known.clear();  // batches of any size
  return known[key] = choose(call, backward, demanded);
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
    choice = known_choice(call, backward, demand.exchange, place);
  STD_TORCH_CHECK(choice.plan || !demand.exchange, "FUSEDRNN_SCHEDULE=", demand.name, " cannot run ",
                  describe(call, backward), ": ", choice.why);
  if (choice.refused)
    log_once(describe(call, backward) + ": " + choice.why + "; it runs " +
             (choice.plan ? "as a " + describe(*choice.plan) : "step by step"));
  return choice.plan;
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
