// Starts kernels, and asks whether they can be: on a GPU, or in the emulator.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../plan.h"
#include "primitives/thread.h"

namespace fusedrnn::cuda {

struct LaunchShape {
  int64_t blocks;
  int threads;
  int64_t shared_bytes;
  int cluster;               // blocks of a cluster; 1: none
  bool cooperative = false;  // all blocks are resident at once
};

#if defined(__CUDACC__)

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(what) + " failed: " + cudaGetErrorString(error));
}

inline int current_device() {
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  return device;
}

inline int device_attribute(cudaDeviceAttr name) {
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, name, current_device()), "cudaDeviceGetAttribute");
  return value;
}

inline constexpr int64_t kSharedBytesUnasked = 48 << 10;  // what any block can have

// The attributes of a launch, and what the kernel must be told before.
class LaunchConfig {
 public:
  template <class Params>
  LaunchConfig(void (*kernel)(Params), const LaunchShape& shape, void* stream) {
    const auto* function = reinterpret_cast<const void*>(kernel);
    // The attribute is the function's, not the launch's: always the same value, so that launches of several
    // threads do not meet one another's.
    if (shape.shared_bytes > kSharedBytesUnasked)
      check_cuda(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)),
                 "cudaFuncSetAttribute");
    if (shape.cluster > 8)
      check_cuda(cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
                 "cudaFuncSetAttribute");
    config_.gridDim = dim3(static_cast<unsigned>(shape.blocks));
    config_.blockDim = dim3(shape.threads);
    config_.dynamicSmemBytes = shape.shared_bytes;
    config_.stream = static_cast<cudaStream_t>(stream);
    config_.attrs = attributes_;
    if (shape.cluster > 1) {
      attributes_[config_.numAttrs].id = cudaLaunchAttributeClusterDimension;
      attributes_[config_.numAttrs++].val.clusterDim = {static_cast<unsigned>(shape.cluster), 1, 1};
      // A multiprocessor each, however small the blocks are.
      attributes_[config_.numAttrs].id = cudaLaunchAttributeClusterSchedulingPolicyPreference;
      attributes_[config_.numAttrs++].val.clusterSchedulingPolicyPreference =
          cudaClusterSchedulingPolicySpread;
    }
    if (shape.cooperative) {
      attributes_[config_.numAttrs].id = cudaLaunchAttributeCooperative;
      attributes_[config_.numAttrs++].val.cooperative = 1;
    }
  }
  LaunchConfig(const LaunchConfig&) = delete;
  LaunchConfig& operator=(const LaunchConfig&) = delete;
  const cudaLaunchConfig_t* get() const { return &config_; }

 private:
  cudaLaunchConfig_t config_{};
  cudaLaunchAttribute attributes_[3]{};
};

template <class Params>
void launch(void (*kernel)(Params), const Params& params, const LaunchShape& shape, void* stream) {
  const LaunchConfig config(kernel, shape, stream);
  void* arguments[] = {const_cast<Params*>(&params)};
  check_cuda(cudaLaunchKernelExC(config.get(), reinterpret_cast<const void*>(kernel), arguments),
             "launching a kernel");
}

// What `ask` returns, or 0 where the device refuses to tell.
template <class Ask>
int count_or_none(Ask ask) {
  try {
    return ask();
  } catch (const std::runtime_error&) {
    cudaGetLastError();  // a refusal is no error of whoever asks next
    return 0;
  }
}

// How many clusters of that shape are resident at once.
template <class Params>
int clusters_at_once(void (*kernel)(Params), const LaunchShape& shape) {
  return count_or_none([&] {
    const LaunchConfig config(kernel, shape, nullptr);
    // The first attribute is the cluster's dimension. The policy after it says where blocks are to go, which
    // changes nothing about what fits, and need not be known to the query.
    cudaLaunchConfig_t asked = *config.get();
    asked.numAttrs = 1;
    int count = 0;
    check_cuda(cudaOccupancyMaxActiveClusters(&count, reinterpret_cast<const void*>(kernel), &asked),
               "an occupancy query");
    return count;
  });
}

// Whether the blocks that must be resident together can be.
template <class Params>
bool fits(void (*kernel)(Params), const LaunchShape& shape) {
  if (shape.cluster > 1) return clusters_at_once(kernel, shape) > 0;
  const int64_t blocks = count_or_none([&] {
    const LaunchConfig config(kernel, shape, nullptr);
    int count = 0;
    check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, reinterpret_cast<const void*>(kernel),
                                                             shape.threads, shape.shared_bytes),
               "an occupancy query");
    return shape.cooperative ? count * device_attribute(cudaDevAttrMultiProcessorCount) : count;
  });
  return blocks >= (shape.cooperative ? shape.blocks : 1);
}

// What the current device has. `kernel`: any that runs in clusters; its blocks get all the shared memory, so
// that no two have one multiprocessor.
template <class Params>
GpuDevice limits_of_current_device(void (*kernel)(Params)) {
  GpuDevice device{device_attribute(cudaDevAttrMultiProcessorCount),
                   device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
                   {},
                   device_attribute(cudaDevAttrCooperativeLaunch) != 0};
  if (device_attribute(cudaDevAttrClusterLaunch))
    for (int i = 0; i < kClusterSizes; ++i)
      device.clusters[i] = clusters_at_once(kernel, {2 << i, kMaxThreads, device.shared_bytes, 2 << i});
  return device;
}

#else

inline int current_device() { return 0; }

template <class Params>
void launch(void (*kernel)(Params), const Params& params, const LaunchShape& shape, void*) {
  emulator::launch({shape.blocks, shape.threads, shape.shared_bytes, shape.cluster, shape.cooperative},
                   [&] { kernel(params); });
}

template <class Params>
bool fits(void (*)(Params), const LaunchShape&) {
  return true;
}

#endif

}  // namespace fusedrnn::cuda
