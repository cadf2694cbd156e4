// Nothing of the driver API is emulated.
#pragma once
#include "cuda_emulator.h"
