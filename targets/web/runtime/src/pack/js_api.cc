/*!
 * The entry points and functions that TVM's JavaScript runtime (@mlc-ai/web-runtime) looks up by
 * name, apart from those of tvm-ffi and the virtual machine.
 */
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/reflection/registry.h>
#include <tvm/runtime/tensor.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#if defined(__wasm__)
#define MLC_FROM_JS(name) __attribute__((import_module("env"), import_name(#name)))
#else
#define MLC_FROM_JS(name)
#endif

extern "C" {

// Provided by the JavaScript side: call, and forget, a function of its table.
MLC_FROM_JS(TVMFFIWasmSafeCall)
int TVMFFIWasmSafeCall(void* self, const TVMFFIAny* args, int32_t num_args, TVMFFIAny* result);
MLC_FROM_JS(TVMFFIWasmFunctionDeleter)
void TVMFFIWasmFunctionDeleter(void* self);

/*! Memory for the JavaScript side, aligned to 8 bytes; freed by TVMWasmFreeSpace. */
TVM_FFI_DLL_EXPORT void* TVMWasmAllocSpace(int size) {
  return new int64_t[(static_cast<size_t>(size) + 7) / 8];
}

TVM_FFI_DLL_EXPORT void TVMWasmFreeSpace(void* space) { delete[] static_cast<int64_t*>(space); }

/*! Make an ffi function of entry `self` in the JavaScript side's function table. */
TVM_FFI_DLL_EXPORT int TVMFFIWasmFunctionCreate(void* self, TVMFFIObjectHandle* out) {
  // Called through, so that the table holds functions of this module and not the imports.
  auto call = [](void* self, const TVMFFIAny* args, int32_t num_args, TVMFFIAny* result) -> int {
    return TVMFFIWasmSafeCall(self, args, num_args, result);
  };
  auto forget = [](void* self) { TVMFFIWasmFunctionDeleter(self); };
  return TVMFFIFunctionCreate(self, call, forget, out);
}

/*! The text of the raised error, valid until the next call. */
TVM_FFI_DLL_EXPORT const char* TVMFFIWasmGetLastError() {
  static std::string text;
  text = tvm::ffi::details::MoveFromSafeCallRaised().what();
  return text.c_str();
}

}  // extern "C"

namespace tvm {
namespace runtime {
namespace {

/*! Fill `tensor` (on the CPU) from a record of tensor-cache.json: `format` says how it is stored. */
void DecodeStorage(Tensor tensor, TVMFFIByteArray* bytes, ffi::String format, ffi::String dtype) {
  TVM_FFI_ICHECK(bytes != nullptr);
  if (format != "f32-to-bf16" || dtype != "float32") {
    tensor.CopyFromBytes(bytes->data, bytes->size);
    return;
  }
  // bfloat16 is the upper half of a float32.
  const DLTensor& to = *tensor.operator->();
  TVM_FFI_ICHECK(to.device.device_type == kDLCPU && tensor.IsContiguous());
  TVM_FFI_ICHECK(to.dtype.code == kDLFloat && to.dtype.bits == 32 && to.dtype.lanes == 1);
  const size_t count = ffi::GetDataSize(to) / sizeof(uint32_t);
  TVM_FFI_ICHECK_EQ(bytes->size, count * sizeof(uint16_t)) << "a bfloat16 record of another size";
  char* out = static_cast<char*>(to.data) + to.byte_offset;
  for (size_t i = 0; i < count; ++i) {
    uint16_t upper;
    std::memcpy(&upper, bytes->data + i * sizeof(upper), sizeof(upper));
    const uint32_t bits = static_cast<uint32_t>(upper) << 16;
    std::memcpy(out + i * sizeof(bits), &bits, sizeof(bits));
  }
}

/*! Widen in place: the first `encoded` bytes of `tensor` hold bfloat16, afterwards all hold float32. */
void WidenInPlace(Tensor tensor, int64_t encoded) {
  const DLTensor& to = *tensor.operator->();
  TVM_FFI_ICHECK(to.device.device_type == kDLCPU && tensor.IsContiguous());
  TVM_FFI_ICHECK(to.dtype.code == kDLFloat && to.dtype.bits == 32 && to.dtype.lanes == 1);
  const size_t count = ffi::GetDataSize(to) / sizeof(uint32_t);
  TVM_FFI_ICHECK_EQ(static_cast<uint64_t>(encoded), static_cast<uint64_t>(count) * 2);
  char* data = static_cast<char*>(to.data) + to.byte_offset;
  // From the end: the wide value covers narrow ones that were already read.
  for (size_t i = count; i-- > 0;) {
    uint16_t upper;
    std::memcpy(&upper, data + i * sizeof(upper), sizeof(upper));
    const uint32_t bits = static_cast<uint32_t>(upper) << 16;
    std::memcpy(data + i * sizeof(bits), &bits, sizeof(bits));
  }
}

/*! The arrays in `args`, one after the other in a new array. */
ffi::Array<ffi::Any> ConcatArrays(ffi::PackedArgs args) {
  ffi::Array<ffi::Any> result;
  for (int i = 0; i < args.size(); ++i) {
    for (ffi::Any item : args[i].cast<ffi::Array<ffi::Any>>()) result.push_back(item);
  }
  return result;
}

/*! The matrices in `args` ([n_i, hidden] on one device), stacked to [sum n_i, hidden]. */
Tensor ConcatRows(ffi::PackedArgs args) {
  TVM_FFI_ICHECK_GT(args.size(), 0);
  std::vector<Tensor> parts;
  int64_t rows = 0;
  for (int i = 0; i < args.size(); ++i) {
    parts.push_back(args[i].cast<Tensor>());
    TVM_FFI_ICHECK_EQ(parts.back()->ndim, 2);
    TVM_FFI_ICHECK_EQ(parts.back()->shape[1], parts[0]->shape[1]);
    rows += parts.back()->shape[0];
  }
  Tensor result =
      Tensor::Empty({rows, parts[0]->shape[1]}, parts[0]->dtype, parts[0]->device);
  uint64_t offset = 0;
  for (const Tensor& part : parts) {
    DLTensor from = *part.operator->();
    DLTensor to = *result.operator->();
    to.shape = from.shape;
    to.byte_offset = offset;
    Tensor::CopyFromTo(&from, &to);
    offset += ffi::GetDataSize(from);
  }
  return result;
}

ffi::Bytes ToBytes(Tensor tensor) {
  std::string bytes(ffi::GetDataSize(*tensor.operator->()), '\0');
  tensor.CopyToBytes(bytes.data(), bytes.size());
  return ffi::Bytes(std::move(bytes));
}

}  // namespace

TVM_FFI_STATIC_INIT_BLOCK() {
  namespace refl = tvm::ffi::reflection;
  refl::GlobalDef()
      .def_packed("tvmjs.array.decode_storage",
                  [](ffi::PackedArgs args, ffi::Any*) {
                    DecodeStorage(args[0].cast<Tensor>(), args[1].cast<TVMFFIByteArray*>(),
                                  args[2].cast<ffi::String>(), args[3].cast<ffi::String>());
                  })
      .def("tvmjs.array.decode_bf16_to_f32_inplace", WidenInPlace)
      .def_packed("tvmjs.runtime.ArrayConcat",
                  [](ffi::PackedArgs args, ffi::Any* ret) { *ret = ConcatArrays(args); })
      .def_packed("tvmjs.runtime.ConcatEmbeddings",
                  [](ffi::PackedArgs args, ffi::Any* ret) { *ret = ConcatRows(args); })
      .def("tvmjs.runtime.TensorCopyFromBytes",
           [](Tensor tensor, TVMFFIByteArray* bytes) {
             tensor.CopyFromBytes(bytes->data, bytes->size);
           })
      .def("tvmjs.runtime.TensorCopyToBytes", ToBytes);
}

}  // namespace runtime
}  // namespace tvm
