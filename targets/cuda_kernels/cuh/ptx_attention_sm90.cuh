// Hopper's warpgroup products as attention needs them: matrices in shared memory that are read
// either way round, and products that begin a sum. Layouts are those of the PTX ISA, section
// "Asynchronous warpgroup level matrix instructions"; see also ptx_sm90.cuh.
#pragma once
#include "ptx.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
namespace mlc {
namespace attention {

// What was written to shared memory before, by this thread or before a barrier that it waited at,
// is visible to the warpgroup products that follow.
__device__ __forceinline__ void fence_shared_for_products() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Registers of each thread of this warpgroup from here on; more only once others have given theirs.
template <int Count>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
}
template <int Count>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
}

// One arrival, once all copies that this thread has started are there.
__device__ __forceinline__ void arrive_with_copies(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier))
               : "memory");
}

// The next four: d = a b (+ d where Add) for a 64x16 in registers, b 16xN in shared memory, N 64
// or 128. Columns: b's columns (n) are together in memory, else its rows (k).
#define MLC_OUT8(n)                                                                             \
  "+f"(d[n]), "+f"(d[n + 1]), "+f"(d[n + 2]), "+f"(d[n + 3]), "+f"(d[n + 4]), "+f"(d[n + 5]),    \
      "+f"(d[n + 6]), "+f"(d[n + 7])
#define MLC_PRODUCT_64(type)                                                                    \
  asm volatile(                                                                                 \
      "{\n\t.reg .pred add;\n\tsetp.ne.b32 add, %37, 0;\n\t"                                    \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                               \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "      \
      "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "                 \
      "{%32, %33, %34, %35}, %36, add, 1, 1, %38;\n\t}"                                         \
      : MLC_OUT8(0), MLC_OUT8(8), MLC_OUT8(16), MLC_OUT8(24)                                    \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{Add}), "n"(int{Columns})    \
      : "memory")
#define MLC_PRODUCT_128(type)                                                                   \
  asm volatile(                                                                                 \
      "{\n\t.reg .pred add;\n\tsetp.ne.b32 add, %69, 0;\n\t"                                    \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                              \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, "      \
      "%18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, "   \
      "%35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, "   \
      "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "                           \
      "{%64, %65, %66, %67}, %68, add, 1, 1, %70;\n\t}"                                         \
      : MLC_OUT8(0), MLC_OUT8(8), MLC_OUT8(16), MLC_OUT8(24), MLC_OUT8(32), MLC_OUT8(40),       \
        MLC_OUT8(48), MLC_OUT8(56)                                                              \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int{Add}), "n"(int{Columns})    \
      : "memory")

template <bool Columns, bool Add>
__device__ __forceinline__ void product(float (&d)[32], const uint32_t (&a)[4], uint64_t b, half) {
  MLC_PRODUCT_64("f16");
}
template <bool Columns, bool Add>
__device__ __forceinline__ void product(float (&d)[32], const uint32_t (&a)[4], uint64_t b,
                                        __nv_bfloat16) {
  MLC_PRODUCT_64("bf16");
}
template <bool Columns, bool Add>
__device__ __forceinline__ void product(float (&d)[64], const uint32_t (&a)[4], uint64_t b, half) {
  MLC_PRODUCT_128("f16");
}
template <bool Columns, bool Add>
__device__ __forceinline__ void product(float (&d)[64], const uint32_t (&a)[4], uint64_t b,
                                        __nv_bfloat16) {
  MLC_PRODUCT_128("bf16");
}
#undef MLC_PRODUCT_64
#undef MLC_PRODUCT_128
#undef MLC_OUT8

// Descriptor of a block of K or V, read either way round: [64 columns][key][64 elements], 128 bytes
// a row, 16-byte pieces permuted. Groups of 8 keys are 1024 bytes apart, columns of 64 Keys * 128.
template <int Keys>
__device__ __forceinline__ uint64_t block_descriptor(const void* block) {
  const uint64_t address = (shared_address(block) & 0x3ffff) >> 4;
  return address | uint64_t{Keys * 128 >> 4} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

}  // namespace attention
}  // namespace mlc
#endif
