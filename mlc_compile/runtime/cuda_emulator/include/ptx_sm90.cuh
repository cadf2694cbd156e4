// What targets/cuda_kernels/cuh/ptx_sm90.cuh has, for the emulated device. Products of a warpgroup
// are computed when they are waited for; until then their registers hold NaN.
#pragma once
#include "ptx.cuh"

extern "C" {
void emu_mbarrier_init(void* barrier, int count, const char* file, int line);
void emu_mbarrier_arrive(void* barrier, int bytes, const char* file, int line);
void emu_mbarrier_wait(void* barrier, int parity, const char* file, int line);
void emu_copy_bulk(void* shared, const void* global, int bytes, void* barrier, const char* file,
                   int line);
void emu_wgmma(float* d, unsigned count, const uint32_t* a, uint64_t b, int bfloat, int columns,
               int add);
void emu_wgmma_commit();
void emu_wgmma_wait(unsigned pending, const char* file, int line);
void emu_store_matrix_trans(void* row, const uint32_t* r, const char* file, int line);
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
namespace mlc {

static inline void barrier_init(uint64_t* barrier, int count, EMU_HERE) {
  emu_mbarrier_init(barrier, count, emu_file, emu_line);
}
static inline void barrier_init_done() {}
static inline void barrier_arrive(uint64_t* barrier, EMU_HERE) {
  emu_mbarrier_arrive(barrier, 0, emu_file, emu_line);
}
static inline void barrier_arrive_expect(uint64_t* barrier, int bytes, EMU_HERE) {
  emu_mbarrier_arrive(barrier, bytes, emu_file, emu_line);
}
static inline void barrier_wait(uint64_t* barrier, int parity, EMU_HERE) {
  emu_mbarrier_wait(barrier, parity, emu_file, emu_line);
}
static inline void named_barrier(int id, int count, EMU_HERE) {
  emu_barrier((unsigned)id, (unsigned)count, 0, 0, emu_file, emu_line);
}
static inline void copy_bulk(void* shared, const void* global, int bytes, uint64_t* barrier,
                             EMU_HERE) {
  emu_copy_bulk(shared, global, bytes, barrier, emu_file, emu_line);
}
static __forceinline__ uint16_t load_constant_16(const void* p) { return *(const uint16_t*)p; }
static __forceinline__ void store_matrix_x4_trans(void* row, uint32_t r0, uint32_t r1, uint32_t r2,
                                                  uint32_t r3, EMU_HERE) {
  uint32_t r[4] = {r0, r1, r2, r3};
  emu_store_matrix_trans(row, r, emu_file, emu_line);
}

static inline void wgmma_fence() {}
static inline void wgmma_commit() { emu_wgmma_commit(); }
template <int Pending>
static inline void wgmma_wait(EMU_HERE) {
  emu_wgmma_wait(Pending, emu_file, emu_line);
}
template <int Count>
static __forceinline__ void wgmma_hold(float (&)[Count]) {}
template <int Count>
static __forceinline__ void wgmma_hold(uint32_t (&)[Count]) {}

static inline uint64_t wgmma_descriptor(const void* tile, EMU_HERE) {
  const uint64_t address = (shared_address(tile, emu_file, emu_line) & 0x3ffff) >> 4;
  return address | uint64_t{1} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}
template <int Count>
static __forceinline__ void wgmma_m64k16(float (&d)[Count], const uint32_t (&a)[4], uint64_t b,
                                         half) {
  emu_wgmma(d, Count, a, b, 0, 0, 1);
}
template <int Count>
static __forceinline__ void wgmma_m64k16(float (&d)[Count], const uint32_t (&a)[4], uint64_t b,
                                         __nv_bfloat16) {
  emu_wgmma(d, Count, a, b, 1, 0, 1);
}

}  // namespace mlc
#endif
