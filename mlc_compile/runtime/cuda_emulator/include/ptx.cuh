// What targets/cuda_kernels/cuh/ptx.cuh has, for the emulated device.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

struct emu_mma {  // of one lane
  float d[4];
  uint32_t a[4], b[2];
};
struct emu_rows {  // of one lane
  const void* row;
  uint32_t r[4];
};
extern "C" {
void emu_do_mma_half(void* const* requests, unsigned mask);
void emu_do_mma_bfloat(void* const* requests, unsigned mask);
void emu_do_load_matrix(void* const* requests, unsigned mask);
void emu_do_load_matrix_trans(void* const* requests, unsigned mask);
void emu_dependency_wait();
}

namespace mlc {

static __forceinline__ uint32_t and_or(uint32_t a, uint32_t b, uint32_t c) { return (a & b) | c; }

static __forceinline__ float exp2_approx(float x) { return exp2f(x); }

static __forceinline__ uint32_t shared_address(const void* p, EMU_HERE) {
  return emu_shared_address(p, emu_file, emu_line);
}

static __forceinline__ uint4 load_streaming(const void* p) { return *(const uint4*)p; }

static __forceinline__ void grid_dependency_wait() {
#if __CUDA_ARCH__ >= 900
  emu_dependency_wait();
#endif
}
static __forceinline__ void grid_dependency_launch() {}

static __forceinline__ void copy_async_16(void* shared, const void* global, bool valid = true,
                                          EMU_HERE) {
#if __CUDA_ARCH__ >= 800
  emu_copy_async(shared, global, 16, valid ? 16 : 0, emu_file, emu_line);
#else
  *(uint4*)shared = valid ? *(const uint4*)global : make_uint4(0, 0, 0, 0);
#endif
}
static __forceinline__ void copy_async_commit() {
#if __CUDA_ARCH__ >= 800
  emu_copy_commit();
#endif
}
template <int Pending>
static __forceinline__ void copy_async_wait() {
#if __CUDA_ARCH__ >= 800
  emu_copy_wait(Pending);
#endif
}

static __forceinline__ void load_matrix_x4(uint32_t (&r)[4], const void* row, EMU_HERE) {
  emu_rows request{row, {}};
  emu_collective(emu::kLoadMatrix, 0xFFFFFFFFu, &request, emu_do_load_matrix, emu_file, emu_line);
  for (int i = 0; i < 4; i++) r[i] = request.r[i];
}
static __forceinline__ void load_matrix_x4_trans(uint32_t (&r)[4], const void* row, EMU_HERE) {
  emu_rows request{row, {}};
  emu_collective(emu::kLoadMatrix, 0xFFFFFFFFu, &request, emu_do_load_matrix_trans, emu_file,
                 emu_line);
  for (int i = 0; i < 4; i++) r[i] = request.r[i];
}

static __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2], half, EMU_HERE) {
  emu_mma request{{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  emu_collective(emu::kMma, 0xFFFFFFFFu, &request, emu_do_mma_half, emu_file, emu_line);
  for (int i = 0; i < 4; i++) d[i] = request.d[i];
}
static __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2], __nv_bfloat16, EMU_HERE) {
#if __CUDA_ARCH__ >= 800
  emu_mma request{{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  emu_collective(emu::kMma, 0xFFFFFFFFu, &request, emu_do_mma_bfloat, emu_file, emu_line);
  for (int i = 0; i < 4; i++) d[i] = request.d[i];
#endif
}

}  // namespace mlc
