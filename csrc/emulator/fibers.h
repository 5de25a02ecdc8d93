// Fibers: flows of control with a stack each, among which one host thread switches. To a sanitizer every
// fiber is a thread; ThreadSanitizer sees only those orders among them that are told to it here.
//
// The emulator itself is never compiled with -fsanitize=thread, or the races of its own data would be
// reported; the kernels are. So the build says for which flavour this is: FUSEDRNN_TSAN, FUSEDRNN_ASAN, or
// neither.
#pragma once

#include <cstddef>

namespace fusedrnn::emulator {

#if defined(FUSEDRNN_TSAN)
inline constexpr bool kRaceChecked = true;
#else
inline constexpr bool kRaceChecked = false;
#endif

#if defined(FUSEDRNN_ASAN)
inline constexpr bool kBoundsChecked = true;
#else
inline constexpr bool kBoundsChecked = false;
#endif

class Fiber {
 public:
  Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber();

  static Fiber& host();  // the calling thread, on its own stack

  // The next switch to this fiber calls `entry`, on an empty stack; entry must not return.
  void start(void (*entry)());
  void switch_to(Fiber& next);            // called by this fiber
  [[noreturn]] void end_in(Fiber& next);  // ... to be started again one day

  // Called by another: forgets what this fiber was about. What it did so far comes before `edge`.
  void abandon(void* edge);

 private:
  struct Host {};
  explicit Fiber(Host);
  static void enter();

  char* memory_ = nullptr;  // a guard page, then the stack
  char* bottom_ = nullptr;  // of the stack: its lowest address
  size_t size_ = 0;
  void* top_ = nullptr;  // of what lies on the stack while the fiber does not run
  void (*entry_)() = nullptr;
  void* identity_ = nullptr;    // ThreadSanitizer's
  void* fake_stack_ = nullptr;  // AddressSanitizer's
};

// What ThreadSanitizer is told. An edge is any address: acquire(e) comes after every release(e) before it.
namespace race {
#if defined(FUSEDRNN_TSAN)
void release(void* edge);
void acquire(void* edge);
void reads(const void* begin, size_t bytes, void* caller);
void writes(void* begin, size_t bytes, void* caller);
#else
inline void release(void*) {}
inline void acquire(void*) {}
inline void reads(const void*, size_t, void*) {}
inline void writes(void*, size_t, void*) {}
#endif
}  // namespace race

// What AddressSanitizer is told: no access to these bytes is allowed.
#if defined(FUSEDRNN_ASAN)
void forbid(void* begin, size_t bytes);
#else
inline void forbid(void*, size_t) {}
#endif

}  // namespace fusedrnn::emulator
