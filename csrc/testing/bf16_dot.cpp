#include "bf16_dot.h"

#include <cpuid.h>
#include <immintrin.h>
#include <signal.h>
#include <ucontext.h>

#include <atomic>
#include <bit>
#include <cstring>
#include <optional>
#include <stdexcept>

namespace fusedrnn {
namespace {

// The vector registers of a thread that was interrupted, as XSAVE left them in its signal frame: the standard
// format, Intel SDM volume 1, chapter 13. A register is cut into parts, which are in components.
class VectorRegisters {
 public:
  static void find_components() {
    for (Component* c : {&kUpperYmm, &kUpperZmm, &kHighZmm}) {
      unsigned unused;
      __cpuid_count(0xd, c->number, c->bytes, c->offset, unused, unused);
      if (c->bytes == 0) throw std::runtime_error("this processor has no AVX-512");
    }
  }

  // Nothing where the frame has no such area.
  static std::optional<VectorRegisters> of(const ucontext_t& context) {
    auto* const area = reinterpret_cast<uint8_t*>(context.uc_mcontext.fpregs);
    _fpx_sw_bytes software;
    std::memcpy(&software, area + kSoftwareBytes, sizeof(software));
    if (software.magic1 != FP_XSTATE_MAGIC1) return {};
    VectorRegisters registers(area);
    // A component whose bit is not set is zero, whatever is in memory.
    uint64_t in_use;
    std::memcpy(&in_use, area + kHeader, sizeof(in_use));
    for (const Component& c : {kXmm, kUpperYmm, kUpperZmm, kHighZmm}) {
      const uint64_t bit = uint64_t{1} << c.number;
      if (!(software.xstate_bv & bit)) return {};
      if (!(in_use & bit)) std::memset(area + c.offset, 0, c.bytes);
      in_use |= bit;
    }
    std::memcpy(area + kHeader, &in_use, sizeof(in_use));
    return registers;
  }

  void load(int zmm, uint32_t* lanes) const {
    for (const Part& part : parts(zmm)) std::memcpy(lanes + part.lane, area_ + part.offset, part.bytes);
  }
  void store(int zmm, const uint32_t* lanes) const {
    for (const Part& part : parts(zmm)) std::memcpy(area_ + part.offset, lanes + part.lane, part.bytes);
  }

 private:
  struct Component {
    unsigned number, offset, bytes;
  };
  struct Part {
    int lane;
    size_t offset, bytes;
  };
  static constexpr size_t kSoftwareBytes = 464, kHeader = 512;
  static constexpr Component kXmm{1, 160, 256};
  static inline Component kUpperYmm{2, 0, 0}, kUpperZmm{6, 0, 0}, kHighZmm{7, 0, 0};

  explicit VectorRegisters(uint8_t* area) : area_(area) {}

  static std::array<Part, 3> parts(int zmm) {
    if (zmm >= 16) return {{{0, kHighZmm.offset + 64u * (zmm - 16), 64}, {}, {}}};
    return {{{0, kXmm.offset + 16u * zmm, 16},
             {4, kUpperYmm.offset + 16u * zmm, 16},
             {8, kUpperZmm.offset + 32u * zmm, 32}}};
  }

  uint8_t* area_;
};

// EVEX.512.F3.0F38.W0 52 /r, Intel SDM volume 2, section 2.7. Nothing for any other instruction.
struct Instruction {
  int sum, a, b;         // registers; b is -1 where it is in memory
  const uint8_t* at;     // where that is
  bool broadcast;        // its first 32 bits are every lane
  const uint8_t* after;  // the next instruction

  static std::optional<Instruction> decode(const ucontext_t& context) {
    const auto& general = context.uc_mcontext.gregs;
    const auto* p = reinterpret_cast<const uint8_t*>(general[REG_RIP]);
    // The prefix has the upper bits of register numbers inverted.
    const uint8_t map = p[1] ^ 0xf0, vector = p[2] ^ 0x78, mode = p[3] ^ 0x08;
    const bool is_dot = p[0] == 0x62 && (map & 0xf) == 2 && (vector & 0x87) == 6 && p[4] == 0x52;
    const bool masked = mode & 0x87;
    if (!is_dot || masked || (mode >> 5 & 3) != 2) return {};
    const int modrm = p[5], mod = modrm >> 6, rm = modrm & 7;
    const int R = map >> 7 & 1, X = map >> 6 & 1, B = map >> 5 & 1, R2 = map >> 4 & 1, V2 = mode >> 3 & 1;
    Instruction out{R2 << 4 | R << 3 | (modrm >> 3 & 7),
                    V2 << 4 | (vector >> 3 & 0xf),
                    -1,
                    nullptr,
                    (mode & 0x10) != 0,
                    p + 6};
    if (mod == 3) {
      out.b = X << 4 | B << 3 | rm;
      if (out.broadcast) return {};
      return out;
    }
    // In the order of their numbers in instructions.
    static constexpr int kGeneral[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                       REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                       REG_R12, REG_R13, REG_R14, REG_R15};
    int base = rm;
    int64_t address = 0;
    if (rm == 4) {
      const int sib = *out.after++, index = X << 3 | (sib >> 3 & 7);
      base = sib & 7;
      if (index != 4) address += general[kGeneral[index]] * (int64_t{1} << (sib >> 6));
    }
    const bool no_base = mod == 0 && base == 5, relative = no_base && rm == 5;
    if (!no_base) address += general[kGeneral[B << 3 | base]];
    if (mod == 1) {  // counts operands
      address += static_cast<int8_t>(*out.after++) * (out.broadcast ? 4 : 64);
    } else if (mod == 2 || no_base) {
      int32_t displacement;
      std::memcpy(&displacement, out.after, sizeof(displacement));
      address += displacement;
      out.after += sizeof(displacement);
    }
    if (relative) address += reinterpret_cast<int64_t>(out.after);
    out.at = reinterpret_cast<const uint8_t*>(address);
    return out;
  }
};

// "FP32 FMA with daz in, ftz out and RNE rounding", of the odd values and then of the even ones: Intel SDM
// volume 2, VDPBF16PS. The caller has set MXCSR to that.
__attribute__((noinline, target("fma"))) void dot(uint32_t* sum, const uint32_t* a, const uint32_t* b) {
  const auto value = [](uint32_t bits) { return std::bit_cast<float>(bits); };
  constexpr uint32_t kOdd = 0xffff0000;
  for (int lane = 0; lane < 16; ++lane) {
    const float first = __builtin_fmaf(value(a[lane] & kOdd), value(b[lane] & kOdd), value(sum[lane]));
    sum[lane] = std::bit_cast<uint32_t>(__builtin_fmaf(value(a[lane] << 16), value(b[lane] << 16), first));
  }
}

std::atomic<int64_t> emulated{0};
struct sigaction previous;

bool emulate(ucontext_t& context) {
  const auto instruction = Instruction::decode(context);
  const auto registers = VectorRegisters::of(context);
  if (!instruction || !registers) return false;
  uint32_t sum[16], a[16], b[16];
  registers->load(instruction->sum, sum);
  registers->load(instruction->a, a);
  if (instruction->b >= 0)
    registers->load(instruction->b, b);
  else
    for (int lane = 0; lane < 16; ++lane)
      std::memcpy(b + lane, instruction->at + (instruction->broadcast ? 0 : 4 * lane), 4);
  // No exceptions, to nearest even, flush to zero, denormals are zero; the end of the handler takes it back.
  _mm_setcsr(0x9fc0);
  dot(sum, a, b);
  registers->store(instruction->sum, sum);
  context.uc_mcontext.gregs[REG_RIP] = reinterpret_cast<greg_t>(instruction->after);
  emulated.fetch_add(1, std::memory_order_relaxed);
  return true;
}

void on_illegal_instruction(int, siginfo_t*, void* context) {
  // What is not ours is met again, by whoever was asked before.
  if (!emulate(*static_cast<ucontext_t*>(context))) sigaction(SIGILL, &previous, nullptr);
}

// The sum and a in two registers, b as `operand` says after `setup`; b's address is %2.
#define FUSEDRNN_DOT(name, sum, a, setup, operand, suffix)                                                   \
  {name, [](uint32_t* s, const uint32_t* x, const uint32_t* y) {                                             \
     asm volatile("vmovups (%0), %%" sum "\n vmovups (%1), %%" a "\n" setup "\n vdpbf16ps " operand ", %%" a \
                  ", %%" sum suffix "\n vmovups %%" sum ", (%0)"                                             \
                  :                                                                                          \
                  : "r"(s), "r"(x), "r"(y)                                                                   \
                  : "memory", "rax", "r12", "r13", "xmm1", "xmm2", "xmm9");                                  \
   }}

constexpr DotForm kForms[] = {
    FUSEDRNN_DOT("registers", "zmm1", "zmm2", "vmovups (%2), %%zmm9", "%%zmm9", ""),
    FUSEDRNN_DOT("high registers", "zmm17", "zmm30", "vmovups (%2), %%zmm25", "%%zmm25", ""),
    FUSEDRNN_DOT("memory", "zmm9", "zmm17", "", "(%2)", ""),
    FUSEDRNN_DOT("short displacement", "zmm1", "zmm2", "lea -128(%2), %%rax", "128(%%rax)", ""),
    FUSEDRNN_DOT("negative displacement", "zmm1", "zmm2", "lea 192(%2), %%r13", "-192(%%r13)", ""),
    FUSEDRNN_DOT("long displacement", "zmm30", "zmm2", "lea -36(%2), %%r12", "36(%%r12)", ""),
    FUSEDRNN_DOT("no displacement, r13", "zmm1", "zmm2", "mov %2, %%r13", "(%%r13)", ""),
    FUSEDRNN_DOT("index", "zmm1", "zmm2", "mov $-10, %%rax\n lea -24(%2), %%r13", "64(%%r13, %%rax, 4)", ""),
    FUSEDRNN_DOT("high index", "zmm1", "zmm2", "mov $5, %%r12\n lea -40(%2), %%rax", "(%%rax, %%r12, 8)", ""),
    FUSEDRNN_DOT("index only", "zmm1", "zmm2", "lea -68(%2), %%rax", "68(, %%rax, 1)", ""),
    FUSEDRNN_DOT(
        "relative", "zmm1", "zmm2",
        ".pushsection .bss\n 1: .skip 64\n .popsection\n vmovups (%2), %%zmm9\n vmovups %%zmm9, 1b(%%rip)\n"
        "vpxord %%zmm9, %%zmm9, %%zmm9",
        "1b(%%rip)", ""),
    FUSEDRNN_DOT("broadcast", "zmm1", "zmm2", "lea -8(%2), %%rax", "8(%%rax)%{1to16%}", ""),
    // Not emulated.
    FUSEDRNN_DOT("masked", "zmm1", "zmm2", "", "(%2)", "%{%%k1%}"),
    FUSEDRNN_DOT("256 bits", "ymm1", "ymm2", "", "(%2)", ""),
};

}  // namespace

void emulate_bf16_dot() {
  static const bool once = [] {
    VectorRegisters::find_components();
    struct sigaction action = {};
    action.sa_sigaction = on_illegal_instruction;
    action.sa_flags = SA_SIGINFO;
    return sigaction(SIGILL, &action, &previous) == 0;
  }();
  if (!once) throw std::runtime_error("no handler for illegal instructions can be set");
}

int64_t bf16_dots() { return emulated; }

std::span<const DotForm> dot_forms() { return kForms; }

}  // namespace fusedrnn
