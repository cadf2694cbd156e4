// Norms and gated activations of rows, 16 bytes an access where the row's size allows it.
//
// Arithmetic is float32 and results are rounded once. Each kernel has a `_dependent` twin for a
// launch that may begin before the one before has ended; it loads the norm's weight meanwhile.
#pragma once
#include "vector.cuh"

namespace mlc {

// The sum over the block, for every thread. Threads are a multiple of 32.
template <int kThreads>
__device__ __forceinline__ float block_sum(float x) {
  __shared__ float sums[32];
#pragma unroll
  for (int step = 16; step; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  if (kThreads == 32) return x;
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) sum += sums[i];
  return sum;
}

// One block a row: out = x / sqrt(mean(x^2) + eps) * weight. With kAdd, x + residual, rounded and
// stored as `total`, takes the place of x.
template <bool kDependent, bool kAdd, typename T, int kWidth, int kThreads>
__device__ __forceinline__ void rms_norm_any(const T* x, const T* residual, const T* weight, T* out,
                                             T* total, float eps) {
  constexpr int kVec = vector_size<T>(kWidth), kVectors = kWidth / kVec;
  constexpr int kHeld = (kVectors + kThreads - 1) / kThreads;
  const int tid = threadIdx.x;
  const size_t row = static_cast<size_t>(blockIdx.x) * kWidth;
  Vector<T, kVec> held[kHeld], scale[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i)
    if (tid + i * kThreads < kVectors)
      scale[i] = load_vector<kVec>(weight + (tid + i * kThreads) * kVec);
  if (kDependent) {
    grid_dependency_launch();
    grid_dependency_wait();
    x = settled(x);
    if (kAdd) residual = settled(residual);
  }
#pragma unroll
  for (int i = 0; i < kHeld; ++i)
    if (tid + i * kThreads < kVectors)
      held[i] = load_vector<kVec>(x + row + (tid + i * kThreads) * kVec);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (tid + i * kThreads < kVectors) {
      if (kAdd) {
        const size_t at = row + (tid + i * kThreads) * kVec;
        const Vector<T, kVec> more = load_vector<kVec>(residual + at);
#pragma unroll
        for (int j = 0; j < kVec; ++j)
          held[i].at[j] = from_float<T>(to_float(held[i].at[j]) + to_float(more.at[j]));
        store_vector(total + at, held[i]);
      }
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        const float value = to_float(held[i].at[j]);
        sum += value * value;
      }
    }
  }
  const float inverse = 1.f / sqrtf(block_sum<kThreads>(sum) * (1.f / kWidth) + eps);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (tid + i * kThreads < kVectors) {
#pragma unroll
      for (int j = 0; j < kVec; ++j)
        held[i].at[j] =
            from_float<T>(to_float(held[i].at[j]) * inverse * to_float(scale[i].at[j]));
      store_vector(out + row + (tid + i * kThreads) * kVec, held[i]);
    }
  }
}

template <typename T, int kWidth, int kThreads>
__device__ __forceinline__ void rms_norm(const T* x, const T* weight, T* out, float eps) {
  rms_norm_any<false, false, T, kWidth, kThreads>(x, nullptr, weight, out, nullptr, eps);
}

template <typename T, int kWidth, int kThreads>
__device__ __forceinline__ void rms_norm_dependent(const T* x, const T* weight, T* out, float eps) {
  rms_norm_any<true, false, T, kWidth, kThreads>(x, nullptr, weight, out, nullptr, eps);
}

template <typename T, int kWidth, int kThreads>
__device__ __forceinline__ void add_rms_norm(const T* x, const T* residual, const T* weight, T* out,
                                             T* total, float eps) {
  rms_norm_any<false, true, T, kWidth, kThreads>(x, residual, weight, out, total, eps);
}

template <typename T, int kWidth, int kThreads>
__device__ __forceinline__ void add_rms_norm_dependent(const T* x, const T* residual,
                                                       const T* weight, T* out, T* total,
                                                       float eps) {
  rms_norm_any<true, true, T, kWidth, kThreads>(x, residual, weight, out, total, eps);
}

// x [heads of all rows, d]: rms_norm over d of query heads with q_weight and key heads with
// k_weight, value heads as they are. A few lanes of a warp a head.
template <bool kDependent, typename T, int kDim, int kQHeads, int kKvHeads, int kThreads>
__device__ __forceinline__ void qk_norm_any(const T* x, const T* q_weight, const T* k_weight,
                                            T* out, int count, float eps) {
  constexpr int kVec = vector_size<T>(kDim), kVectors = kDim / kVec;
  constexpr int kLanes = kVectors > 16 ? 32 : kVectors > 8 ? 16 : kVectors > 4 ? 8 : 4;
  constexpr int kHeld = (kVectors + kLanes - 1) / kLanes, kHeads = kQHeads + 2 * kKvHeads;
  const int lane = threadIdx.x % kLanes;
  const int n = blockIdx.x * (kThreads / kLanes) + threadIdx.x / kLanes;
  const int head = n % kHeads;
  const bool inside = n < count, normed = head < kQHeads + kKvHeads;
  if (kDependent) {
    grid_dependency_launch();
    grid_dependency_wait();
    x = settled(x);
  }
  Vector<T, kVec> held[kHeld];
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int e = lane + i * kLanes;
    if (inside && e < kVectors) {
      held[i] = load_vector<kVec>(x + static_cast<size_t>(n) * kDim + e * kVec);
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        const float value = to_float(held[i].at[j]);
        sum += value * value;
      }
    }
  }
#pragma unroll
  for (int step = kLanes / 2; step; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  const float inverse = 1.f / sqrtf(sum * (1.f / kDim) + eps);
  const T* const weight = head < kQHeads ? q_weight : k_weight;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int e = lane + i * kLanes;
    if (inside && e < kVectors) {
      if (normed) {
        const Vector<T, kVec> scale = load_vector<kVec>(weight + e * kVec);
#pragma unroll
        for (int j = 0; j < kVec; ++j)
          held[i].at[j] =
              from_float<T>(to_float(held[i].at[j]) * inverse * to_float(scale.at[j]));
      }
      store_vector(out + static_cast<size_t>(n) * kDim + e * kVec, held[i]);
    }
  }
}

template <typename T, int kDim, int kQHeads, int kKvHeads, int kThreads>
__device__ __forceinline__ void qk_norm(const T* x, const T* q_weight, const T* k_weight, T* out,
                                        int count, float eps) {
  qk_norm_any<false, T, kDim, kQHeads, kKvHeads, kThreads>(x, q_weight, k_weight, out, count, eps);
}

template <typename T, int kDim, int kQHeads, int kKvHeads, int kThreads>
__device__ __forceinline__ void qk_norm_dependent(const T* x, const T* q_weight, const T* k_weight,
                                                  T* out, int count, float eps) {
  qk_norm_any<true, T, kDim, kQHeads, kKvHeads, kThreads>(x, q_weight, k_weight, out, count, eps);
}

// x / (1 + e^power). The power may overflow to infinity, whose inverse is the right 0. A result
// that is rounded to 16 bits anyway takes the faster division and power: the exact division alone
// takes longer than the memory.
template <typename T>
__device__ __forceinline__ float over_one_plus_exp(float x, float power) {
  if (sizeof(T) == 4) return x / (1.f + expf(power));
  return __fdividef(x, 1.f + __expf(power));
}

// Activations, for results that are rounded to T.
struct Silu {
  template <typename T>
  static __device__ __forceinline__ float of(float x) {
    return over_one_plus_exp<T>(x, -x);
  }
};
struct GeluTanh {
  // x/2 (1 + tanh(u)) with u = sqrt(2/pi) (x + 0.044715 x^3), as x / (1 + e^-2u).
  template <typename T>
  static __device__ __forceinline__ float of(float x) {
    return over_one_plus_exp<T>(x, -x * (1.5957691216057308f + 0.07135481282562302f * x * x));
  }
};
struct Gelu {
  template <typename T>
  static __device__ __forceinline__ float of(float x) {
    return 0.5f * x * erfcf(x * -0.7071067811865476f);
  }
};
struct Relu {
  template <typename T>
  static __device__ __forceinline__ float of(float x) {
    return fmaxf(x, 0.f);
  }
};

// gate_up [rows, 2 I] -> act(gate) * up [rows, I]; one thread kVec elements, a divisor of I.
template <bool kDependent, typename Act, typename T, int kWidth, int kVec, int kThreads>
__device__ __forceinline__ void gated_any(const T* gate_up, T* out, int rows) {
  constexpr int kVectors = kWidth / kVec;
  const int n = blockIdx.x * kThreads + threadIdx.x, row = n / kVectors, i = n % kVectors;
  if (kDependent) {
    grid_dependency_launch();
    grid_dependency_wait();
    gate_up = settled(gate_up);
  }
  if (row >= rows) return;
  const T* const from = gate_up + static_cast<size_t>(row) * (2 * kWidth) + i * kVec;
  Vector<T, kVec> gate = load_vector<kVec>(from);
  const Vector<T, kVec> up = load_vector<kVec>(from + kWidth);
#pragma unroll
  for (int j = 0; j < kVec; ++j)
    gate.at[j] =
        from_float<T>(Act::template of<T>(to_float(gate.at[j])) * to_float(up.at[j]));
  store_vector(out + static_cast<size_t>(n) * kVec, gate);
}

template <typename Act, typename T, int kWidth, int kVec, int kThreads>
__device__ __forceinline__ void gated(const T* gate_up, T* out, int rows) {
  gated_any<false, Act, T, kWidth, kVec, kThreads>(gate_up, out, rows);
}

template <typename Act, typename T, int kWidth, int kVec, int kThreads>
__device__ __forceinline__ void gated_dependent(const T* gate_up, T* out, int rows) {
  gated_any<true, Act, T, kWidth, kVec, kThreads>(gate_up, out, rows);
}

}  // namespace mlc
