// The memory of a kernel's tensors.
#pragma once

#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "fibers.h"
#include "reference.h"

namespace fusedrnn::emulator {

// Numbers as a kernel sees them: NaN until written, between guards that nobody may touch.
class Buffer {
 public:
  Buffer(cuda::Number number, int64_t count)
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
  void set(int64_t i, double value) {
    with(i, [&]<class E>(E& element) { element = device::narrow<E>(static_cast<WidenedTo<E>>(value)); });
  }
  void set(const Values& values) {
    for (int64_t i = 0; i < count_; ++i) set(i, values[i]);
  }
  bool guards_hold() {
    const auto hold = [](const char* guard) {
      return std::all_of(guard, guard + kGuard, [](char c) { return c == '\xff'; });
    };
    return kBoundsChecked || (hold(memory_.data()) && hold(end()));
  }

 private:
  static constexpr int64_t kGuard = 1024;
  template <class E>
  using WidenedTo = decltype(device::widen(E{}));

  int64_t bytes() const {
    return count_ * (number_ == cuda::Number::kDouble ? 8 : number_ == cuda::Number::kFloat ? 4 : 2);
  }
  template <class F>
  void with(int64_t i, F f) {
    switch (number_) {
      case cuda::Number::kBFloat16:
        return f(reinterpret_cast<BFloat16*>(begin())[i]);
      case cuda::Number::kHalf:
        return f(reinterpret_cast<device::Half*>(begin())[i]);
      case cuda::Number::kFloat:
        return f(reinterpret_cast<float*>(begin())[i]);
      case cuda::Number::kDouble:
        return f(reinterpret_cast<double*>(begin())[i]);
    }
  }

  cuda::Number number_;
  int64_t count_;
  std::vector<char> memory_;
};

class Buffers {
 public:
  // Memory of that name, made when it is first asked for.
  void* add(const std::string& name, cuda::Number number, int64_t count) {
    return buffers_.try_emplace(name, number, count).first->second.begin();
  }
  void* add(const std::string& name, cuda::Number number, const Values& values) {
    const auto [found, made] = buffers_.try_emplace(name, number, std::ssize(values));
    if (made) found->second.set(values);
    return found->second.begin();
  }
  Buffer& operator[](const std::string& name) { return buffers_.at(name); }
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

}  // namespace fusedrnn::emulator
