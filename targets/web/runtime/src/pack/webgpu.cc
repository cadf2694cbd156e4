/*! The WebGPU device, in terms of functions that the JavaScript side registers. */
#include "web/emcc/webgpu_runtime.cc"
