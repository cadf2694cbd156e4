/*! What TVM's runtime expects of its platform, for one thread without a file system. */
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>
#include <tvm/runtime/c_backend_api.h>
#include <tvm/runtime/logging.h>

#include <cstdlib>
#include <iostream>
#include <string>

#include "src/runtime/file_utils.h"

int TVMBackendParallelLaunch(FTVMParallelLambda body, void* data, int) {
  TVMParallelGroupEnv env{};
  env.num_task = 1;
  return body(0, &env, data);
}

int TVMBackendParallelBarrier(int, TVMParallelGroupEnv*) { return 0; }

namespace tvm {
namespace runtime {

void LoadBinaryFromFile(const std::string& path, std::string*) {
  TVM_FFI_THROW(RuntimeError) << "cannot read " << path << ": there is no file system here";
}

void SaveBinaryToFile(const std::string& path, const std::string&) {
  TVM_FFI_THROW(RuntimeError) << "cannot write " << path << ": there is no file system here";
}

namespace detail {

[[noreturn]] void LogFatalImpl(const std::string& file, int line, const std::string& message) {
  std::cerr << "[FATAL] " << file << ":" << line << ": " << message << std::endl;
  std::abort();
}

void LogMessageImpl(const std::string& file, int line, int level, const std::string& message) {
  static constexpr const char* kNames[] = {"DEBUG", "INFO", "WARNING", "ERROR"};
  std::ostream& out = level >= 2 ? std::cerr : std::cout;
  const char* name = level >= 0 && level < 4 ? kNames[level] : "LOG";
  out << "[" << name << "] " << file << ":" << line << ": " << message << std::endl;
}

}  // namespace detail
}  // namespace runtime
}  // namespace tvm
