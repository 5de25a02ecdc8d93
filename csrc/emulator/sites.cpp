#include "sites.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <tuple>

namespace fusedrnn::emulator {

namespace {

// Keyed by the addresses of the compiler's own strings, so that a visit compares no text. It never grows,
// since kernels may not allocate: of a kernel's operations, a dozen or two are sites.
struct Entry {
  const char* operation;
  const char* file;
  uint32_t line;
  bool weakens;
  Mode mode;
};
constexpr size_t kEntries = 1024;
Entry entries[kEntries];

std::string chosen;
Mode how = Mode::kLeftOut;

std::string name(const char* file, uint32_t line) {
  const char* slash = std::strrchr(file, '/');
  return std::string(slash ? slash + 1 : file) + ':' + std::to_string(line);
}

Mode mode_of(const char* file, uint32_t line) {
  return !chosen.empty() && name(file, line) == chosen ? how : Mode::kWhole;
}

Mode note(const char* operation, const Site& site, bool weakens) {
  const char* file = site.file_name();
  const uint32_t line = site.line();
  const size_t hash = reinterpret_cast<uintptr_t>(file) / 8 + line * 31 + operation[0];
  for (size_t i = 0; i < kEntries; ++i) {
    Entry& entry = entries[(hash + i) % kEntries];
    if (!entry.file) entry = {operation, file, line, weakens, mode_of(file, line)};
    if (entry.file == file && entry.line == line && entry.operation == operation) return entry.mode;
  }
  throw std::runtime_error("the emulator knows no more than 1024 sites");
}

}  // namespace

Mode visit(const char* operation, const Site& site) { return note(operation, site, true); }
bool left_out(const char* operation, const Site& site) {
  return note(operation, site, false) == Mode::kLeftOut;
}

bool same(const Site& a, const Site& b) {
  return a.line() == b.line() &&
         (a.file_name() == b.file_name() || !std::strcmp(a.file_name(), b.file_name()));
}

std::string name(const Site& site) { return name(site.file_name(), site.line()); }
std::string name(const char* operation, const Site& site) { return operation + (" at " + name(site)); }

void choose(const Options& options) {
  chosen = options.without;
  how = options.weakened ? Mode::kWeakened : Mode::kLeftOut;
  for (Entry& entry : entries)
    if (entry.file) entry.mode = mode_of(entry.file, entry.line);
}

std::vector<Operation> visited() {
  std::vector<Operation> operations;
  for (const Entry& entry : entries)
    if (entry.file) operations.push_back({name(entry.file, entry.line), entry.operation, entry.weakens});
  const auto key = [](const Operation& o) { return std::tie(o.site, o.name); };
  std::ranges::sort(operations, {}, key);
  const auto repeated = std::ranges::unique(operations, {}, key);  // a header's string in several objects
  operations.erase(repeated.begin(), repeated.end());
  return operations;
}

}  // namespace fusedrnn::emulator
