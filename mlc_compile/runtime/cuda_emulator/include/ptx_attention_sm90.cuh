// What targets/cuda_kernels/cuh/ptx_attention_sm90.cuh has, for the emulated device.
#pragma once
#include "ptx_sm90.cuh"

extern "C" void emu_mbarrier_arrive_late(void* barrier, const char* file, int line);

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
namespace mlc {
namespace attention {

static inline void fence_shared_for_products() {}
template <int Count>
static inline void give_registers() {}
template <int Count>
static inline void take_registers() {}
static inline void arrive_with_copies(uint64_t* barrier, EMU_HERE) {
  emu_mbarrier_arrive_late(barrier, emu_file, emu_line);
}
template <int Keys>
static inline uint64_t block_descriptor(const void* block, EMU_HERE) {
  const uint64_t address = (shared_address(block, emu_file, emu_line) & 0x3ffff) >> 4;
  return address | uint64_t{Keys * 128 >> 4} << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}
template <bool Columns, bool Add, int Count>
static __forceinline__ void product(float (&d)[Count], const uint32_t (&a)[4], uint64_t b, half) {
  emu_wgmma(d, Count, a, b, 0, Columns, Add);
}
template <bool Columns, bool Add, int Count>
static __forceinline__ void product(float (&d)[Count], const uint32_t (&a)[4], uint64_t b,
                                    __nv_bfloat16) {
  emu_wgmma(d, Count, a, b, 1, Columns, Add);
}

}  // namespace attention
}  // namespace mlc
#endif
