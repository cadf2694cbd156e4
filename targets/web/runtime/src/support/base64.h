/*!
 * Base64 streams in name only: the one user is the pickling of tensors, which a model library never
 * does. Using one throws.
 */
#ifndef MLC_COMPILE_SUPPORT_BASE64_H_
#define MLC_COMPILE_SUPPORT_BASE64_H_

#include <tvm/ffi/error.h>
#include <tvm/support/io.h>

namespace tvm {
namespace support {

class NoBase64Stream : public Stream {
 public:
  using Stream::Read;
  using Stream::Write;

  explicit NoBase64Stream(Stream*) {}

  size_t Read(void*, size_t) final { return Refuse(); }
  size_t Write(const void*, size_t) final { return Refuse(); }
  void InitPosition() {}
  void Finish() {}

 private:
  static size_t Refuse() {
    TVM_FFI_THROW(InternalError) << "this runtime has no base64 (tensors can't be pickled)";
    return 0;
  }
};

using Base64InStream = NoBase64Stream;
using Base64OutStream = NoBase64Stream;

}  // namespace support
}  // namespace tvm

#endif  // MLC_COMPILE_SUPPORT_BASE64_H_
