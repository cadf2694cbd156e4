// The runtime's WebGPU half for a process that runs Python, and what keeps the two apart at exit:
// C++ frees device memory of static and thread-local objects after Python has gone.
#include "web/emcc/webgpu_runtime.cc"

extern "C" int Py_IsInitialized(void);

namespace {

// A function that forwards to `callee` while Python runs and does nothing afterwards.
tvm::ffi::Function WhilePythonRuns(tvm::ffi::Function callee) {
  return tvm::ffi::Function::FromPacked(
      [callee](tvm::ffi::PackedArgs args, tvm::ffi::Any* result) {
        if (Py_IsInitialized()) callee.CallPacked(args, result);
      });
}

}  // namespace

TVM_FFI_STATIC_INIT_BLOCK() {
  tvm::ffi::reflection::GlobalDef().def("mlc_compile.while_python_runs", WhilePythonRuns);
}
