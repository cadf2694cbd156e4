/*! The paged key-value cache and the recurrent state. */
#include "src/runtime/vm/attn_backend.cc"
#include "src/runtime/vm/kv_state.cc"
#include "src/runtime/vm/paged_kv_cache.cc"
#include "src/runtime/vm/rnn_state.cc"
