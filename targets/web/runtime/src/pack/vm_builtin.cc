/*! The functions that the virtual machine's code calls. */
#include "src/runtime/vm/builtin.cc"
#include "src/runtime/vm/lm_support.cc"
