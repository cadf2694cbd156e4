// What bounds attention beside the order of keys: a cap of the scores (Gemma 2, arXiv 2408.00118),
// and a window of positions in some layers.
#pragma once
#include "ptx.cuh"

namespace mlc {
namespace attention {

// Scores as they are, and no key hidden but by the order.
struct Unbounded {
  static constexpr bool Capped = false, Windowed = false;
  float inner;

  __device__ __forceinline__ Unbounded of(int, int) const { return *this; }
  __device__ __forceinline__ int low(int) const { return 0; }
};

// Scores are bounded by tanh(inner * score), in what the kernels call the scale's units, where
// `Cap`; a key less than `window` positions before a row's is seen, where `Window` and window > 0.
// The position of key 0 of sequence b is offsets[b].
template <bool Cap, bool Window>
struct Bounded {
  static constexpr bool Capped = Cap, Windowed = Window;
  float inner;
  const int *positions, *offsets;  // of all tokens; then: of the sequence's, and its own
  int window;

  __device__ __forceinline__ Bounded of(int token, int b) const {
    return {inner, positions + token, offsets + b, window};
  }
  // The first key that a token of the sequence sees.
  __device__ __forceinline__ int low(int token) const {
    return window > 0 ? max(positions[token] - *offsets - window + 1, 0) : 0;
  }
};

// tanh for any x with an error of 2e-7, which the scores of a 16-bit cache do not show.
__device__ __forceinline__ float tanh_approx(float x) {
  return 1.f - __fdividef(2.f, 1.f + exp2_approx(fminf(x, 40.f) * 2.8853900817779268f));
}

}  // namespace attention
}  // namespace mlc
