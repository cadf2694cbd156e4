// Around attention: splits fused q, k, v and rotates q and k, puts keys and values into pages, and
// merges two attentions over different keys.
//
// Each kernel has a `_dependent` twin for a launch that may begin before the one before has ended.
#pragma once
#include "vector.cuh"

namespace mlc {

// qkv [rows, q + 2 kv, d] -> q, k, v; dimension i < kHalf turns with i + kHalf. Grid (rows, parts):
// the parts share the items of a row. A block computes the row's sines and cosines once.
template <bool kDependent, typename T, int kDim, int kHalf, int kQHeads, int kKvHeads, int kThreads>
__device__ __forceinline__ void split_rotary_any(const T* qkv, const int* position, T* q, T* k,
                                                 T* v, const float* inv_freq, float factor) {
  constexpr int kVec = vector_size<T>(kDim, kHalf);
  constexpr int kPairs = kHalf / kVec, kItems = kDim / kVec - kPairs;  // of a head
  constexpr int kHeads = kQHeads + 2 * kKvHeads, kAll = kHeads * kItems;
  __shared__ float sines[kHalf > 0 ? kHalf : 1], cosines[kHalf > 0 ? kHalf : 1];
  const int row = blockIdx.x, tid = threadIdx.x;

  float frequency = tid < kHalf ? inv_freq[tid] : 0.f;
  if (kDependent) {
    grid_dependency_launch();
    grid_dependency_wait();
    qkv = settled(qkv);
    position = settled(position);
  }
  const T* const from = qkv + static_cast<size_t>(row) * (kHeads * kDim);
  int item = blockIdx.y * kThreads + tid;
  // The first item is under way while the angles are computed.
  Vector<T, kVec> low, high;
  const auto load = [&]() {
    const int head = item / kItems, i = item % kItems;
    low = load_vector<kVec>(from + head * kDim + (i < kPairs ? i : i + kPairs) * kVec);
    if (i < kPairs) high = load_vector<kVec>(from + head * kDim + kHalf + i * kVec);
  };
  if (item < kAll) load();

  const float at = static_cast<float>(position[row]);
  for (int i = tid; i < kHalf; i += kThreads) {
    if (i >= kThreads) frequency = inv_freq[i];
    float s, c;
    sincosf(at * frequency, &s, &c);
    sines[i] = s * factor;
    cosines[i] = c * factor;
  }
  __syncthreads();

  while (item < kAll) {
    const int head = item / kItems, i = item % kItems;
    T* to;
    if (head < kQHeads)
      to = q + (static_cast<size_t>(row) * kQHeads + head) * kDim;
    else if (head < kQHeads + kKvHeads)
      to = k + (static_cast<size_t>(row) * kKvHeads + (head - kQHeads)) * kDim;
    else
      to = v + (static_cast<size_t>(row) * kKvHeads + (head - kQHeads - kKvHeads)) * kDim;
    if (i < kPairs) {
      if (head < kQHeads + kKvHeads) {
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          const float x = to_float(low.at[j]), y = to_float(high.at[j]);
          const float s = sines[i * kVec + j], c = cosines[i * kVec + j];
          low.at[j] = from_float<T>(x * c - y * s);
          high.at[j] = from_float<T>(y * c + x * s);
        }
      }
      store_vector(to + i * kVec, low);
      store_vector(to + kHalf + i * kVec, high);
    } else {
      store_vector(to + (i + kPairs) * kVec, low);
    }
    item += gridDim.y * kThreads;
    if (item < kAll) load();
  }
}

template <typename T, int kDim, int kHalf, int kQHeads, int kKvHeads, int kThreads>
__device__ __forceinline__ void split_rotary(const T* qkv, const int* position, T* q, T* k, T* v,
                                             const float* inv_freq, float factor) {
  split_rotary_any<false, T, kDim, kHalf, kQHeads, kKvHeads, kThreads>(qkv, position, q, k, v,
                                                                       inv_freq, factor);
}

template <typename T, int kDim, int kHalf, int kQHeads, int kKvHeads, int kThreads>
__device__ __forceinline__ void split_rotary_dependent(const T* qkv, const int* position, T* q,
                                                       T* k, T* v, const float* inv_freq,
                                                       float factor) {
  split_rotary_any<true, T, kDim, kHalf, kQHeads, kKvHeads, kThreads>(qkv, position, q, k, v,
                                                                      inv_freq, factor);
}

// The same for few rows, where nothing but latency counts: one thread a pair of dimensions, or one
// dimension behind those that turn. Grid: rows * heads * (d - kHalf) threads.
template <bool kDependent, typename T, int kDim, int kHalf, int kQHeads, int kKvHeads, int kThreads>
__device__ __forceinline__ void split_rotary_few_any(const T* qkv, const int* position, T* q, T* k,
                                                     T* v, const float* inv_freq, float factor,
                                                     int rows) {
  constexpr int kWidth = kDim - kHalf, kHeads = kQHeads + 2 * kKvHeads;
  const int n = blockIdx.x * kThreads + threadIdx.x;
  const int at = n / kWidth, i = n % kWidth, row = at / kHeads, head = at % kHeads;
  const bool pair = i < kHalf;
  const float frequency = pair ? inv_freq[i] : 0.f;
  if (kDependent) {
    grid_dependency_launch();
    grid_dependency_wait();
    qkv = settled(qkv);
    position = settled(position);
  }
  if (row >= rows) return;
  const T* const from = qkv + static_cast<size_t>(at) * kDim + i;
  T low = pair ? from[0] : from[kHalf], high = from[kHalf];
  if (pair && head < kQHeads + kKvHeads) {
    float s, c;
    sincosf(static_cast<float>(position[row]) * frequency, &s, &c);
    const float x = to_float(low), y = to_float(high);
    low = from_float<T>((x * c - y * s) * factor);
    high = from_float<T>((y * c + x * s) * factor);
  }
  T* to;
  if (head < kQHeads)
    to = q + (static_cast<size_t>(row) * kQHeads + head) * kDim;
  else if (head < kQHeads + kKvHeads)
    to = k + (static_cast<size_t>(row) * kKvHeads + (head - kQHeads)) * kDim;
  else
    to = v + (static_cast<size_t>(row) * kKvHeads + (head - kQHeads - kKvHeads)) * kDim;
  if (pair) to[i] = low;
  to[i + kHalf] = high;
}

template <typename T, int kDim, int kHalf, int kQHeads, int kKvHeads, int kThreads>
__device__ __forceinline__ void split_rotary_few(const T* qkv, const int* position, T* q, T* k,
                                                 T* v, const float* inv_freq, float factor,
                                                 int rows) {
  split_rotary_few_any<false, T, kDim, kHalf, kQHeads, kKvHeads, kThreads>(
      qkv, position, q, k, v, inv_freq, factor, rows);
}

template <typename T, int kDim, int kHalf, int kQHeads, int kKvHeads, int kThreads>
__device__ __forceinline__ void split_rotary_few_dependent(const T* qkv, const int* position, T* q,
                                                           T* k, T* v, const float* inv_freq,
                                                           float factor, int rows) {
  split_rotary_few_any<true, T, kDim, kHalf, kQHeads, kKvHeads, kThreads>(
      qkv, position, q, k, v, inv_freq, factor, rows);
}

// k, v [rows, kv, d] into pages [P, 2, kv, 16, d] at slot[row], unless that is negative. One thread
// kVec elements of both.
template <bool kDependent, typename T, int kDim, int kKvHeads, int kVec, int kThreads>
__device__ __forceinline__ void transpose_append_any(T* pages, const T* k, const T* v,
                                                     const int* slot, int rows) {
  constexpr int kRow = kKvHeads * kDim / kVec;
  const int n = blockIdx.x * kThreads + threadIdx.x, row = n / kRow, i = n % kRow;
  if (kDependent) {
    grid_dependency_launch();
    grid_dependency_wait();
    k = settled(k);
    v = settled(v);
    slot = settled(slot);
  }
  if (row >= rows) return;
  const int at = slot[row];
  const size_t from = static_cast<size_t>(n) * kVec;
  const Vector<T, kVec> key = load_vector<kVec>(k + from), value = load_vector<kVec>(v + from);
  if (at < 0) return;
  const int head = i / (kDim / kVec), e = i % (kDim / kVec) * kVec;
  T* const to = pages + ((static_cast<size_t>(at / 16) * (2 * kKvHeads) + head) * 16 + at % 16) *
                            kDim + e;
  store_vector(to, key);
  store_vector(to + kKvHeads * 16 * kDim, value);
}

template <typename T, int kDim, int kKvHeads, int kVec, int kThreads>
__device__ __forceinline__ void transpose_append(T* pages, const T* k, const T* v, const int* slot,
                                                 int rows) {
  transpose_append_any<false, T, kDim, kKvHeads, kVec, kThreads>(pages, k, v, slot, rows);
}

template <typename T, int kDim, int kKvHeads, int kVec, int kThreads>
__device__ __forceinline__ void transpose_append_dependent(T* pages, const T* k, const T* v,
                                                           const int* slot, int rows) {
  transpose_append_any<true, T, kDim, kKvHeads, kVec, kThreads>(pages, k, v, slot, rows);
}

// out, lse become those of the union of both sets of keys. Rows are [rows * heads, d], and threads
// of a row are neighbours in a block; lse in base 2.
template <bool kDependent, typename T, int kDim, int kThreads>
__device__ __forceinline__ void merge_state_any(T* out, float* lse, const T* other_out,
                                                const float* other_lse, int rows) {
  constexpr int kVec = vector_size<T>(kDim), kRow = kDim / kVec, kRows = kThreads / kRow;
  const int y = threadIdx.x / kRow, i = threadIdx.x % kRow, row = blockIdx.x * kRows + y;
  const bool inside = y < kRows && row < rows;
  if (kDependent) {
    grid_dependency_launch();
    grid_dependency_wait();
    other_out = settled(other_out);
    other_lse = settled(other_lse);
  }
  float high = 0, p = 0, q = 0;
  Vector<T, kVec> mine, other;
  const size_t at = static_cast<size_t>(row) * kDim + i * kVec;
  if (inside) {
    mine = load_vector<kVec>(static_cast<const T*>(out + at));
    other = load_vector<kVec>(other_out + at);
    const float a = lse[row], b = other_lse[row];
    high = fmaxf(a, b);
    p = exp2f(a - high);
    q = exp2f(b - high);
  }
  __syncthreads();  // every thread of a row has read what one of them writes
  if (!inside) return;
  const float both = p + q;  // at least 1: one of the two exponents is 0
  if (i == 0) lse[row] = high + log2f(both);
  p /= both;
  q /= both;
#pragma unroll
  for (int j = 0; j < kVec; ++j)
    mine.at[j] = from_float<T>(to_float(mine.at[j]) * p + to_float(other.at[j]) * q);
  store_vector(out + at, mine);
}

template <typename T, int kDim, int kThreads>
__device__ __forceinline__ void merge_state(T* out, float* lse, const T* other_out,
                                            const float* other_lse, int rows) {
  merge_state_any<false, T, kDim, kThreads>(out, lse, other_out, other_lse, rows);
}

template <typename T, int kDim, int kThreads>
__device__ __forceinline__ void merge_state_dependent(T* out, float* lse, const T* other_out,
                                                      const float* other_lse, int rows) {
  merge_state_any<true, T, kDim, kThreads>(out, lse, other_out, other_lse, rows);
}

}  // namespace mlc
