#include "fibers.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <system_error>

#if defined(FUSEDRNN_TSAN)
#include <sanitizer/tsan_interface.h>
extern "C" {
void __tsan_read_range_pc(const void* begin, size_t bytes, void* caller);
void __tsan_write_range_pc(void* begin, size_t bytes, void* caller);
}
#endif
#if defined(FUSEDRNN_ASAN)
#include <sanitizer/asan_interface.h>
#endif

#if !defined(__x86_64__)
#error "The emulator switches stacks with x86-64 instructions."
#endif

// Leaves the callee-saved registers on the running stack and its top in *from; goes on where `to` was left.
// (swapcontext would also save the signal mask, with a system call each time.)
extern "C" __attribute__((visibility("hidden"))) void fusedrnn_switch_stack(void** from, void* to);
asm(R"(
  .pushsection .text
  .type fusedrnn_switch_stack, @function
fusedrnn_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size fusedrnn_switch_stack, .-fusedrnn_switch_stack
  .popsection
)");

namespace fusedrnn::emulator {

namespace {

constexpr int kSavedWords = 6;

// A sanitizer's report is written on the stack of the fiber that it is about. Pages are taken as they are
// used.
constexpr size_t kStackBytes = (kRaceChecked || kBoundsChecked ? 256 : 64) << 10;

// Stacks all begin at a multiple of a large power of two. Without these offsets the busiest lines of all of
// them would fall into the same few sets of the caches.
constexpr size_t kColours = 32, kColourBytes = 192;

thread_local Fiber* starting;  // for enter(), which takes no argument

}  // namespace

Fiber::Fiber() : size_(kStackBytes) {
  const size_t guard = sysconf(_SC_PAGESIZE);
  void* memory = mmap(nullptr, guard + size_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(static_cast<char*>(memory) + guard, size_, PROT_READ | PROT_WRITE)) {
    const int error = errno;
    if (memory != MAP_FAILED) munmap(memory, guard + size_);
    throw std::system_error(error, std::generic_category(), "the stack of an emulated thread");
  }
  memory_ = static_cast<char*>(memory);
  bottom_ = memory_ + guard;
#if defined(FUSEDRNN_TSAN)
  identity_ = __tsan_create_fiber(0);
#endif
}

Fiber::Fiber(Host) {
#if defined(FUSEDRNN_TSAN)
  identity_ = __tsan_get_current_fiber();
#elif defined(FUSEDRNN_ASAN)
  pthread_attr_t attributes;
  void* bottom;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &bottom, &size_);
  pthread_attr_destroy(&attributes);
  bottom_ = static_cast<char*>(bottom);
#endif
}

Fiber::~Fiber() {
  if (!memory_) return;
#if defined(FUSEDRNN_TSAN)
  __tsan_destroy_fiber(identity_);
#endif
  munmap(memory_, bottom_ - memory_ + size_);
}

Fiber& Fiber::host() {
  thread_local Fiber fiber{Host{}};
  return fiber;
}

void Fiber::start(void (*entry)()) {
  entry_ = entry;
  const size_t colour = (reinterpret_cast<uintptr_t>(memory_) / kStackBytes) % kColours * kColourBytes;
  // As if enter() had been called from nowhere, and had then switched away before its first instruction.
  void** words = reinterpret_cast<void**>(bottom_ + size_ - colour);
  *--words = nullptr;
  *--words = reinterpret_cast<void*>(&Fiber::enter);
  for (int i = 0; i < kSavedWords; ++i) *--words = nullptr;
  top_ = words;
}

void Fiber::enter() {
  Fiber& self = *starting;
#if defined(FUSEDRNN_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  self.entry_();
}

void Fiber::switch_to(Fiber& next) {
  starting = &next;
#if defined(FUSEDRNN_TSAN)
  __tsan_switch_to_fiber(next.identity_, __tsan_switch_to_fiber_no_sync);
#elif defined(FUSEDRNN_ASAN)
  __sanitizer_start_switch_fiber(&fake_stack_, next.bottom_, next.size_);
#endif
  fusedrnn_switch_stack(&top_, next.top_);
#if defined(FUSEDRNN_ASAN)
  __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
}

void Fiber::end_in(Fiber& next) {
  starting = &next;
#if defined(FUSEDRNN_TSAN)
  __tsan_switch_to_fiber(next.identity_, __tsan_switch_to_fiber_no_sync);
#elif defined(FUSEDRNN_ASAN)
  __sanitizer_start_switch_fiber(nullptr, next.bottom_, next.size_);
#endif
  fusedrnn_switch_stack(&top_, next.top_);
  __builtin_unreachable();
}

void Fiber::abandon([[maybe_unused]] void* edge) {
#if defined(FUSEDRNN_TSAN)
  void* caller = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(identity_, __tsan_switch_to_fiber_no_sync);
  __tsan_release(edge);
  __tsan_switch_to_fiber(caller, __tsan_switch_to_fiber_no_sync);
  __tsan_destroy_fiber(identity_);
  identity_ = __tsan_create_fiber(0);
#elif defined(FUSEDRNN_ASAN)
  __asan_unpoison_memory_region(bottom_, size_);  // its frames are there still
#endif
}

#if defined(FUSEDRNN_TSAN)
namespace race {
void release(void* edge) { __tsan_release(edge); }
void acquire(void* edge) { __tsan_acquire(edge); }
void reads(const void* begin, size_t bytes, void* caller) { __tsan_read_range_pc(begin, bytes, caller); }
void writes(void* begin, size_t bytes, void* caller) { __tsan_write_range_pc(begin, bytes, caller); }
}  // namespace race
#endif

#if defined(FUSEDRNN_ASAN)
void forbid(void* begin, size_t bytes) { __asan_poison_memory_region(begin, bytes); }
#endif

}  // namespace fusedrnn::emulator
