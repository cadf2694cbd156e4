// CUDA C++ for the emulated device: what nvcc defines without an inclusion, for the host's compiler.
//
// A thread of a block is a fibre. A unit is compiled with -fsanitize=thread, whose calls before
// each load and store (`__tsan_read4` and so on) the emulator's core answers instead of the
// sanitizer's runtime: so plain pointers and arrays are checked, and the source stays as it is.
// -D__CUDA_ARCH__=750, 800 or 900 chooses the device.
#pragma once

#include <assert.h>
#include <limits.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <type_traits>

#define MLC_CUDA_EMULATOR 1
#ifndef __CUDA_ARCH__
#define __CUDA_ARCH__ 800
#endif
#if __CUDA_ARCH__ >= 900 && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define __CUDA_ARCH_FEAT_SM90_ALL 1
#endif
#define __CUDACC__ 1
#define __CUDACC_VER_MAJOR__ 13
#define __CUDACC_VER_MINOR__ 0
#define __NVCC__ 1
#define CUDART_VERSION 13000
#define CUDA_VERSION 13000

// ---- the core (core/fibre.cc) ------------------------------------------------------------------

struct uint3 {
  unsigned x, y, z;
};

namespace emu {

enum kind { kShuffle, kVote, kSyncWarp, kMatch, kReduce, kLoadMatrix, kMma, kWarpGroup };

struct place {  // of source text
  const char* file;
  int line;
};

}  // namespace emu

extern "C" {
// Constant: a function on a fibre never sees another thread's.
uint3 emu_thread_idx() __attribute__((const));
uint3 emu_block_idx() __attribute__((const));
uint3 emu_block_dim() __attribute__((const));
uint3 emu_grid_dim() __attribute__((const));
unsigned emu_lane() __attribute__((const));
unsigned emu_live_lanes();
// Threads of the block that wait at barrier `id`: `count` of them (0: all). The number of threads
// that came with a predicate other than 0.
int emu_barrier(unsigned id, unsigned count, int predicate, int arrive_only, const char* file,
                int line);
// Waits until every lane of `mask` has come with the same kind and mask; the last one calls
// `combine` with the requests of all (null for lanes that aren't in the mask).
void emu_collective(int kind, unsigned mask, void* request,
                    void (*combine)(void* const* requests, unsigned mask), const char* file,
                    int line);
[[noreturn]] void emu_fault(const char* what, const char* file, int line);
// As the compiler's calls do, for memory that an instruction without a name in C++ touches.
void emu_access(const void* p, unsigned bytes, int write, int lane);
// An atomic operation at p; also a point where other threads may go on.
void emu_atomic(const void* p, unsigned bytes);
void emu_fence(int block_only);
void emu_pause();
void emu_copy_async(void* shared, const void* global, unsigned bytes, unsigned source_bytes,
                    const char* file, int line);
void emu_copy_commit();
void emu_copy_wait(unsigned pending);
unsigned emu_shared_address(const void* p, const char* file, int line);
void* emu_from_shared(unsigned address);
unsigned char* emu_dynamic_shared();
unsigned emu_dynamic_shared_bytes();
const char* emu_launch(const char* name, const unsigned* grid, const unsigned* block,
                       unsigned shared_bytes, void (*thread)(void*), void* argument,
                       const void* library);
void emu_register(const void* p, size_t bytes, const char* name);
void emu_forget(const void* p);
void* emu_allocate(size_t bytes, const char* name);
void emu_release(void* p);
}

#define EMU_HERE const char *emu_file = __builtin_FILE(), int emu_line = __builtin_LINE()
#define EMU_RAW __attribute__((no_sanitize_thread))

// ---- words of the language ---------------------------------------------------------------------

#define __device__
#define __host__
#define __global__ __attribute__((noinline))
#define __constant__ static
#define __grid_constant__
// One in each OS thread, and nothing else is: the TLS segment of a unit is its static shared memory.
#define __shared__ thread_local __attribute__((used))
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __maxnreg__(...)
#define __align__(n) __attribute__((aligned(n)))
#define alignas(n) __attribute__((aligned(n)))
#ifndef __clang__
#define __builtin_assume(x)
#endif

#define threadIdx (emu_thread_idx())
#define blockIdx (emu_block_idx())
#define blockDim (emu_block_dim())
#define gridDim (emu_grid_dim())
constexpr int warpSize = 32;

#define CUDART_INF_F __builtin_inff()
#define CUDART_NAN_F __builtin_nanf("")

// ---- vector types ------------------------------------------------------------------------------

#define EMU_VECTORS(name, type, a2, a4)                                                          \
  struct name##1 { type x; };                                                                    \
  struct __align__(a2) name##2 { type x, y; };                                                   \
  struct __align__(a4) name##4 { type x, y, z, w; };                                             \
  static inline name##1 make_##name##1(type x) { return {x}; }                                   \
  static inline name##2 make_##name##2(type x, type y) { return {x, y}; }                        \
  static inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
#define EMU_VECTOR3(name, type)                                                                  \
  struct name##3 { type x, y, z; };                                                              \
  static inline name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }
EMU_VECTORS(char, signed char, 2, 4)
EMU_VECTORS(uchar, unsigned char, 2, 4)
EMU_VECTORS(short, short, 4, 8)
EMU_VECTORS(ushort, unsigned short, 4, 8)
EMU_VECTORS(int, int, 8, 16)
EMU_VECTORS(uint, unsigned, 8, 16)
EMU_VECTORS(float, float, 8, 16)
EMU_VECTORS(double, double, 16, 16)
EMU_VECTORS(longlong, long long, 16, 16)
EMU_VECTORS(ulonglong, unsigned long long, 16, 16)
EMU_VECTOR3(char, signed char)
EMU_VECTOR3(uchar, unsigned char)
EMU_VECTOR3(short, short)
EMU_VECTOR3(ushort, unsigned short)
EMU_VECTOR3(int, int)
EMU_VECTOR3(float, float)
EMU_VECTOR3(double, double)
static inline uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
#undef EMU_VECTORS
#undef EMU_VECTOR3

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// ---- arithmetic --------------------------------------------------------------------------------

namespace emu {

template <class To, class From>
static __forceinline__ To bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  return __builtin_bit_cast(To, from);
}

}  // namespace emu

#define EMU_MIN_MAX(type)                                                  \
  static inline type min(type a, type b) { return b < a ? b : a; }         \
  static inline type max(type a, type b) { return a < b ? b : a; }
EMU_MIN_MAX(int)
EMU_MIN_MAX(unsigned)
EMU_MIN_MAX(long)
EMU_MIN_MAX(unsigned long)
EMU_MIN_MAX(long long)
EMU_MIN_MAX(unsigned long long)
#undef EMU_MIN_MAX
static inline unsigned min(int a, unsigned b) { return min((unsigned)a, b); }
static inline unsigned min(unsigned a, int b) { return min(a, (unsigned)b); }
static inline unsigned max(int a, unsigned b) { return max((unsigned)a, b); }
static inline unsigned max(unsigned a, int b) { return max(a, (unsigned)b); }
static inline float min(float a, float b) { return fminf(a, b); }
static inline float max(float a, float b) { return fmaxf(a, b); }
static inline double min(double a, double b) { return fmin(a, b); }
static inline double max(double a, double b) { return fmax(a, b); }

static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
static inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
static inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __ffsll(long long x) { return __builtin_ffsll(x); }
static inline unsigned __brev(unsigned x) {
  unsigned r = 0;
  for (int i = 0; i < 32; i++) r |= (x >> i & 1u) << (31 - i);
  return r;
}
static inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  unsigned long long both = (unsigned long long)y << 32 | x;
  unsigned r = 0;
  for (int i = 0; i < 4; i++) {
    unsigned n = selector >> (4 * i) & 0xF;
    unsigned byte = (unsigned)(both >> (8 * (n & 7)) & 0xFF);
    if (n & 8) byte = byte & 0x80 ? 0xFF : 0;  // its sign, replicated
    r |= byte << (8 * i);
  }
  return r;
}
static inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned n) {
  n &= 31;
  return n ? high << n | low >> (32 - n) : high;
}
static inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned n) {
  n &= 31;
  return n ? low >> n | high << (32 - n) : low;
}
static inline unsigned __umulhi(unsigned a, unsigned b) {
  return (unsigned)((unsigned long long)a * b >> 32);
}
static inline int __mulhi(int a, int b) { return (int)((long long)a * b >> 32); }
static inline unsigned __umul24(unsigned a, unsigned b) { return (a & 0xFFFFFF) * (b & 0xFFFFFF); }
static inline int __mul24(int a, int b) { return (int)((unsigned)(a << 8 >> 8) * (unsigned)(b << 8 >> 8)); }
static inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; i++) c += (signed char)(a >> (8 * i)) * (signed char)(b >> (8 * i));
  return c;
}
static inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int i = 0; i < 4; i++) c += (a >> (8 * i) & 0xFF) * (b >> (8 * i) & 0xFF);
  return c;
}
static inline unsigned __float_as_uint(float x) { return emu::bits<unsigned>(x); }
static inline int __float_as_int(float x) { return emu::bits<int>(x); }
static inline float __uint_as_float(unsigned x) { return emu::bits<float>(x); }
static inline float __int_as_float(int x) { return emu::bits<float>(x); }
static inline long long __double_as_longlong(double x) { return emu::bits<long long>(x); }
static inline double __longlong_as_double(long long x) { return emu::bits<double>(x); }
static inline int __float2int_rn(float x) { return (int)rintf(x); }
static inline int __float2int_rz(float x) { return (int)x; }
static inline int __float2int_rd(float x) { return (int)floorf(x); }
static inline int __float2int_ru(float x) { return (int)ceilf(x); }
static inline unsigned __float2uint_rn(float x) { return (unsigned)rintf(x); }
static inline unsigned __float2uint_rz(float x) { return (unsigned)x; }
static inline float __int2float_rn(int x) { return (float)x; }
static inline float __uint2float_rn(unsigned x) { return (float)x; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __fsqrt_rn(float a) { return sqrtf(a); }
static inline float __frcp_rn(float a) { return 1.0f / a; }
static inline float __frsqrt_rn(float a) { return 1.0f / sqrtf(a); }
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __saturatef(float x) { return x > 0 ? (x < 1 ? x : 1) : 0; }

// glibc has some of these names.
namespace emu {
static inline float rsqrt(float x) { return (float)(1.0 / ::sqrt((double)x)); }
static inline float exp10_(float x) { return (float)::pow(10.0, (double)x); }
static inline void sincos_(float x, float* s, float* c) {
  *s = ::sinf(x);
  *c = ::cosf(x);
}
}  // namespace emu
#define rsqrtf(x) emu::rsqrt(x)
#define exp10f(x) emu::exp10_(x)
#define __exp10f(x) emu::exp10_(x)
#define sincosf(x, s, c) emu::sincos_(x, s, c)
#define __sincosf(x, s, c) emu::sincos_(x, s, c)
#define __expf(x) expf(x)
#define __exp2f(x) exp2f(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __log10f(x) log10f(x)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __tanf(x) tanf(x)
#define __powf(x, y) powf(x, y)
#define __tanhf(x) tanhf(x)

// ---- memory ------------------------------------------------------------------------------------

template <class T>
static __forceinline__ T __ldg(const T* p) { return *p; }
template <class T>
static __forceinline__ T __ldcg(const T* p) { return *p; }
template <class T>
static __forceinline__ T __ldca(const T* p) { return *p; }
template <class T>
static __forceinline__ T __ldcs(const T* p) { return *p; }
template <class T>
static __forceinline__ T __ldlu(const T* p) { return *p; }
template <class T>
static __forceinline__ T __ldcv(const T* p) { return *p; }
template <class T>
static __forceinline__ void __stwb(T* p, std::type_identity_t<T> v) { *p = v; }
template <class T>
static __forceinline__ void __stcg(T* p, std::type_identity_t<T> v) { *p = v; }
template <class T>
static __forceinline__ void __stcs(T* p, std::type_identity_t<T> v) { *p = v; }
template <class T>
static __forceinline__ void __stwt(T* p, std::type_identity_t<T> v) { *p = v; }

static inline size_t __cvta_generic_to_shared(const void* p, EMU_HERE) {
  return emu_shared_address(p, emu_file, emu_line);
}
static inline void* __cvta_shared_to_generic(size_t p) { return emu_from_shared((unsigned)p); }
static inline void __threadfence() { emu_fence(0); }
static inline void __threadfence_block() { emu_fence(1); }
static inline void __threadfence_system() { emu_fence(0); }
static inline void __nanosleep(unsigned) { emu_pause(); }
static inline long long clock64() { return 0; }
static inline void __trap() { emu_fault("__trap", "", 0); }

namespace emu {

template <class T, class F>
EMU_RAW static inline T atomic(T* p, F change) {
  emu_atomic(p, sizeof(T));
  T old = *p;
  *p = change(old);
  return old;
}

}  // namespace emu

#define EMU_ATOMIC(name, change)                                                              \
  template <class T>                                                                          \
  EMU_RAW static inline T name(T* p, std::type_identity_t<T> v) {                             \
    emu_atomic(p, sizeof(T));                                                                 \
    T old = *p;                                                                               \
    *p = change;                                                                              \
    return old;                                                                               \
  }                                                                                           \
  template <class T>                                                                          \
  EMU_RAW static inline T name##_block(T* p, std::type_identity_t<T> v) { return name(p, v); } \
  template <class T>                                                                          \
  EMU_RAW static inline T name##_system(T* p, std::type_identity_t<T> v) { return name(p, v); }
EMU_ATOMIC(atomicAdd, T(old + v))
EMU_ATOMIC(atomicSub, T(old - v))
EMU_ATOMIC(atomicExch, v)
EMU_ATOMIC(atomicMax, old < v ? v : old)
EMU_ATOMIC(atomicMin, v < old ? v : old)
EMU_ATOMIC(atomicAnd, T(old & v))
EMU_ATOMIC(atomicOr, T(old | v))
EMU_ATOMIC(atomicXor, T(old ^ v))
EMU_ATOMIC(atomicInc, old >= v ? T(0) : T(old + 1))
EMU_ATOMIC(atomicDec, old == 0 || old > v ? v : T(old - 1))
#undef EMU_ATOMIC
template <class T>
EMU_RAW static inline T atomicCAS(T* p, std::type_identity_t<T> expected,
                                  std::type_identity_t<T> v) {
  emu_atomic(p, sizeof(T));
  T old = *p;
  if (old == expected) *p = v;
  return old;
}

// ---- barriers and warps ------------------------------------------------------------------------

static inline void __syncthreads(EMU_HERE) { emu_barrier(0, 0, 0, 0, emu_file, emu_line); }
static inline int __syncthreads_count(int p, EMU_HERE) {
  return emu_barrier(0, 0, p != 0, 0, emu_file, emu_line);
}
static inline int __syncthreads_or(int p, EMU_HERE) {
  return emu_barrier(0, 0, p != 0, 0, emu_file, emu_line) != 0;
}
static inline int __syncthreads_and(int p, EMU_HERE) {
  return emu_barrier(0, 0, p == 0, 0, emu_file, emu_line) == 0;
}

namespace emu {

struct shuffle {
  unsigned long long value, result;
  int source;  // lane; -1: its own
};

// Run by the last lane, on requests that live on the stacks of the others.
EMU_RAW static inline void do_shuffle(void* const* requests, unsigned mask) {
  for (int i = 0; i < 32; i++)
    if (mask >> i & 1) {
      shuffle& r = *(shuffle*)requests[i];
      int from = r.source < 0 ? i : r.source;
      if (!(mask >> from & 1)) {
        emu_fault("a shuffle reads a lane that is not in its mask", "", 0);
      }
      r.result = ((shuffle*)requests[from])->value;
    }
}

template <class T>
static __forceinline__ T shuffled(unsigned mask, T value, int source, const char* file, int line) {
  static_assert(sizeof(T) <= 8, "a shuffle of more than 8 bytes");
  shuffle request{0, 0, source};
  __builtin_memcpy(&request.value, &value, sizeof(T));
  emu_collective(kShuffle, mask, &request, do_shuffle, file, line);
  T result;
  __builtin_memcpy(&result, &request.result, sizeof(T));
  return result;
}

struct vote {
  unsigned value, result;
};

EMU_RAW static inline void do_ballot(void* const* requests, unsigned mask) {
  unsigned all = 0;
  for (int i = 0; i < 32; i++)
    if (mask >> i & 1) all |= (((vote*)requests[i])->value != 0 ? 1u : 0u) << i;
  for (int i = 0; i < 32; i++)
    if (mask >> i & 1) ((vote*)requests[i])->result = all;
}

struct match {
  unsigned long long value;
  unsigned result;
};

EMU_RAW static inline void do_match(void* const* requests, unsigned mask) {
  for (int i = 0; i < 32; i++) {
    if (!(mask >> i & 1)) continue;
    match& r = *(match*)requests[i];
    r.result = 0;
    for (int k = 0; k < 32; k++)
      if (mask >> k & 1 && ((match*)requests[k])->value == r.value) r.result |= 1u << k;
  }
}

template <class T>
struct reduction {
  T value, result;
};

template <class T, class F>
EMU_RAW static inline void do_reduce(void* const* requests, unsigned mask) {
  T all{};
  bool first = true;
  for (int i = 0; i < 32; i++)
    if (mask >> i & 1) {
      T v = ((reduction<T>*)requests[i])->value;
      all = first ? v : F::of(all, v);
      first = false;
    }
  for (int i = 0; i < 32; i++)
    if (mask >> i & 1) ((reduction<T>*)requests[i])->result = all;
}

}  // namespace emu

static inline unsigned __activemask() { return emu_live_lanes(); }
static inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, EMU_HERE) {
  emu_collective(emu::kSyncWarp, mask, nullptr, nullptr, emu_file, emu_line);
}
static inline unsigned __ballot_sync(unsigned mask, int predicate, EMU_HERE) {
  emu::vote request{predicate != 0, 0};
  emu_collective(emu::kVote, mask, &request, emu::do_ballot, emu_file, emu_line);
  return request.result;
}
static inline int __any_sync(unsigned mask, int predicate, EMU_HERE) {
  return __ballot_sync(mask, predicate, emu_file, emu_line) != 0;
}
static inline int __all_sync(unsigned mask, int predicate, EMU_HERE) {
  return __ballot_sync(mask, predicate, emu_file, emu_line) == mask;
}
static inline int __uni_sync(unsigned mask, int predicate, EMU_HERE) {
  unsigned all = __ballot_sync(mask, predicate, emu_file, emu_line);
  return all == 0 || all == mask;
}
template <class T>
static inline unsigned __match_any_sync(unsigned mask, T value, EMU_HERE) {
  emu::match request{0, 0};
  __builtin_memcpy(&request.value, &value, sizeof(T));
  emu_collective(emu::kMatch, mask, &request, emu::do_match, emu_file, emu_line);
  return request.result;
}
// PTX ISA, "shfl.sync": lanes outside of the segment of `width` keep their own value.
template <class T>
static __forceinline__ T __shfl_sync(unsigned mask, T v, int lane, int width = 32, EMU_HERE) {
  int self = (int)emu_lane(), low = self & ~(width - 1);
  return emu::shuffled(mask, v, low + (lane & (width - 1)), emu_file, emu_line);
}
template <class T>
static __forceinline__ T __shfl_up_sync(unsigned mask, T v, unsigned n, int width = 32, EMU_HERE) {
  int self = (int)emu_lane(), low = self & ~(width - 1), from = self - (int)n;
  return emu::shuffled(mask, v, from < low ? self : from, emu_file, emu_line);
}
template <class T>
static __forceinline__ T __shfl_down_sync(unsigned mask, T v, unsigned n, int width = 32,
                                          EMU_HERE) {
  int self = (int)emu_lane(), high = self | (width - 1), from = self + (int)n;
  return emu::shuffled(mask, v, from > high ? self : from, emu_file, emu_line);
}
template <class T>
static __forceinline__ T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32, EMU_HERE) {
  int self = (int)emu_lane(), high = self | (width - 1), from = self ^ bits;
  return emu::shuffled(mask, v, from > high ? self : from, emu_file, emu_line);
}

#define EMU_REDUCE(name, type, expression)                                                 \
  namespace emu {                                                                          \
  struct name##_##type {                                                                   \
    static type of(type a, type b) { return expression; }                                  \
  };                                                                                       \
  }                                                                                        \
  static inline type name(unsigned mask, type v, EMU_HERE) {                               \
    emu::reduction<type> request{v, 0};                                                    \
    emu_collective(emu::kReduce, mask, &request, emu::do_reduce<type, emu::name##_##type>, \
                   emu_file, emu_line);                                                    \
    return request.result;                                                                 \
  }
#if __CUDA_ARCH__ >= 800
EMU_REDUCE(__reduce_add_sync, int, a + b)
EMU_REDUCE(__reduce_add_sync, unsigned, a + b)
EMU_REDUCE(__reduce_min_sync, int, a < b ? a : b)
EMU_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
EMU_REDUCE(__reduce_max_sync, int, a > b ? a : b)
EMU_REDUCE(__reduce_max_sync, unsigned, a > b ? a : b)
EMU_REDUCE(__reduce_and_sync, unsigned, a & b)
EMU_REDUCE(__reduce_or_sync, unsigned, a | b)
EMU_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
#endif
#undef EMU_REDUCE

namespace emu {

// What a launch passes: a pointer, an integer in 64 bits, or a double.
template <class T>
EMU_RAW static inline T argument(uint64_t word) {
  if constexpr (std::is_pointer_v<T>) {
    return (T)word;
  } else if constexpr (std::is_integral_v<T>) {
    return (T)(int64_t)word;
  } else {
    return T((float)bits<double>(word));
  }
}

}  // namespace emu

// ---- a host program's part ---------------------------------------------------------------------

// Run thread() for every thread of the grid, whose blocks have `shared_bytes` of dynamic shared
// memory (emu_dynamic_shared()); what is wrong is printed and ends the program.
template <class F>
static inline void emulate(dim3 grid, dim3 block, size_t shared_bytes, F&& thread,
                           const char* name = "kernel") {
  unsigned g[3] = {grid.x, grid.y, grid.z}, b[3] = {block.x, block.y, block.z};
  using body = std::remove_reference_t<F>;
  static char here;
  const char* fault = emu_launch(
      name, g, b, (unsigned)shared_bytes, [](void* f) { (*(body*)f)(); }, (void*)&thread, &here);
  if (*fault) {
    fprintf(stderr, "CUDA emulator: %s\n", fault);
    ::abort();
  }
}
