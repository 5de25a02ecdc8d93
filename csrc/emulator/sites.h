// The places in kernels where an operation that orders memory stands: each is noted when it is first run, and
// a test may leave one of them out, or weaken it.
#pragma once

#include <string>
#include <vector>

#include "runtime.h"

namespace fusedrnn::emulator {

enum class Mode : uint8_t { kWhole, kLeftOut, kWeakened };

// Notes the site, and says what is to be done there. Weakened, the operation does all but order memory.
Mode visit(const char* operation, const Site& site);
// The same for an operation that has no weaker form: it does nothing else, or gives no order by itself.
bool left_out(const char* operation, const Site& site);

bool same(const Site& a, const Site& b);
std::string name(const Site& site);                         // "file.h:line"
std::string name(const char* operation, const Site& site);  // "operation at file.h:line"

// Of all sites, also of those not yet visited. Neither may be called while a kernel runs.
void choose(const Options& options);
std::vector<Operation> visited();

}  // namespace fusedrnn::emulator
