// Empty: no 8-bit floats are emulated.
#pragma once
#include "cuda_fp16.h"
