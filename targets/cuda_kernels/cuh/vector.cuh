// Several elements in one access, and element types as float32.
#pragma once
#include "ptx.cuh"

namespace mlc {

template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T at[N];
};

// As many elements of T as 16 bytes hold, if each of `width` and `other` is a multiple; else fewer.
template <typename T>
__host__ __device__ constexpr int vector_size(int width, int other = 0) {
  int n = 16 / static_cast<int>(sizeof(T));
  while (width % n || other % n) n /= 2;
  return n;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ half from_float<half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

template <int N, typename T>
__device__ __forceinline__ Vector<T, N> load_vector(const T* from) {
  return *reinterpret_cast<const Vector<T, N>*>(from);
}

template <int N, typename T>
__device__ __forceinline__ void store_vector(T* to, const Vector<T, N>& v) {
  *reinterpret_cast<Vector<T, N>*>(to) = v;
}

// ptx: a pointer whose loads stay behind the grid_dependency_wait before it: the compiler takes
// what `const T* __restrict__` points to for constant, and could read it before the wait.
template <typename T>
__device__ __forceinline__ T* settled(T* p) {
#ifndef MLC_CUDA_EMULATOR
  asm volatile("" : "+l"(p) : : "memory");
#endif
  return p;
}

}  // namespace mlc
