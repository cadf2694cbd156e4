// Launches of translated kernels.
#pragma once

#define MSL_MODE 2
#include <string>
#include <vector>

#include "msl_core.h"

// Run all threadgroups of `group.grid`; what is wrong with the kernel, or "".
std::string msl_run(const msl::kernel& kernel, const msl::group& group);
// Threads that a threadgroup may have.
unsigned msl_max_threads();
