// The places in kernels where an operation that orders memory stands: each is noted when it is first run, and
// a test may leave one of them out.
#pragma once

#include <string>
#include <vector>

#include "runtime.h"

namespace fusedrnn::emulator {

enum class Mode : uint8_t { kWhole, kLeftOut, kWeakened };

// Notes the site. Says what is to be done there.
Mode visit(const char* operation, const Site& site);

bool same(const Site& a, const Site& b);
std::string name(const Site& site);                         // "file.h:line"
std::string name(const char* operation, const Site& site);  // "operation at file.h:line"

// Of all sites, also of those not yet visited. Neither may be called while a kernel runs.
void choose(const Options& options);
std::vector<std::string> visited();

}  // namespace fusedrnn::emulator
