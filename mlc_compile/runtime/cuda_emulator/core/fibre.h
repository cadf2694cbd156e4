// Launches on the emulated device.
#pragma once

#include <cstddef>
#include <string>

namespace emu {

struct settings {
  int order = 2;  // 0 ascending, 1 descending, 2 shuffled at every switch
  unsigned seed = 0;
  bool races = false;
  unsigned max_threads = 1024;
  unsigned max_shared = 227u << 10;  // static and dynamic, of a block
};
extern settings chosen;

}  // namespace emu
