#include "plan.h"

#include <algorithm>

namespace fusedrnn {

ResidentPlan plan_resident(int64_t N, int64_t B, int64_t H, int64_t bytes_hh, bool projected,
                           int64_t units_per_slice, const CpuDevice& device) {
  const int64_t workers = std::max<int64_t>(1, device.threads / std::max<int64_t>(1, N));
  const int64_t slices = std::min({workers, H / units_per_slice, kMaxUnitSlices});
  // A step that is short next to a hand-over (half a microsecond, about 64 KiB of weights) is left to one
  // worker.
  const bool worth = !projected && slices > 1 && bytes_hh * B >= (int64_t{128} << 10);
  // Chunks of the batch need no hand-over, but each reads all weights at every step: that pays while they
  // stay in the core's own cache, which gates and h share with them.
  if (worth && (B < 2 * workers || bytes_hh > device.cache_bytes / 2)) return {1, slices, nullptr};
  return {std::clamp<int64_t>(B, 1, workers), 1, nullptr};
}

std::vector<int64_t> balanced_rows(const Steps& steps, int64_t chunks) {
  std::vector<int64_t> bounds{0};
  int64_t taken = 0;
  for (int64_t b = 0, t = steps.T; b < steps.B; ++b) {
    while (t > 0 && steps.count(t - 1) <= b) --t;  // t: length of sequence b
    taken += t;
    const auto chunk = static_cast<int64_t>(bounds.size());
    if (chunk < chunks && (taken * chunks >= steps.rows() * chunk || steps.B - b - 1 == chunks - chunk))
      bounds.push_back(b + 1);
  }
  bounds.resize(chunks + 1, steps.B);
  return bounds;
}

}  // namespace fusedrnn
