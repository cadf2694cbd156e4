/*! Profiler ranges: none here. */
#ifndef MLC_COMPILE_SUPPORT_CUDA_NVTX_H_
#define MLC_COMPILE_SUPPORT_CUDA_NVTX_H_

namespace tvm {
namespace support {

struct NVTXScopedRange {
  template <typename Name>
  explicit NVTXScopedRange(const Name&) {}
};

}  // namespace support
}  // namespace tvm

#endif  // MLC_COMPILE_SUPPORT_CUDA_NVTX_H_
