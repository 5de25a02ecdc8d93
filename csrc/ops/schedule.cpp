#include "schedule.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <set>

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

std::optional<PersistentPlan> choose_plan(const Call& call, bool backward) {
  const Demand demand = demanded();
  if (demand.stepwise) return {};
  std::optional<PersistentPlan> chosen, refused;
  std::string why;
  if (call.dtype == ScalarType::Double) {
    why = "float64 runs step by step";
  } else if (call.projected()) {
    why = "a projection runs step by step";
  } else if (call.T > 1 || demand.exchange) {  // a single step does not repay loading the weights
    const Number number = number_of(call.dtype);
    const GpuProblem problem{pass_of(call.id, number, call.tf32, backward), call.N, call.B, call.H};
    for (const PersistentPlan& plan : plan_persistent(problem, device_limits())) {
      if (demand.exchange && plan.exchange != *demand.exchange) continue;
      if (resident(plan, backward, call.id, number, call.tf32)) {
        chosen = plan;
        break;
      }
      if (!refused) refused = plan;
    }
    why = refused ? "this device cannot keep a " + describe(*refused) + " resident"
                  : "no such plan fits this device and hidden size " + std::to_string(call.H);
  }
  STD_TORCH_CHECK(chosen || !demand.exchange, "FUSEDRNN_SCHEDULE=", demand.name, " cannot run ",
                  describe(call, backward), ": ", why);
  if (refused)
    log_once(describe(call, backward) + ": " + why + "; it runs " +
             (chosen ? "as a " + describe(*chosen) : "step by step"));
  return chosen;
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
