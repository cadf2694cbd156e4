/*! Streams over bytes in memory. */
#ifndef MLC_COMPILE_SUPPORT_BYTES_IO_H_
#define MLC_COMPILE_SUPPORT_BYTES_IO_H_

#include <tvm/ffi/error.h>
#include <tvm/support/io.h>

#include <algorithm>
#include <cstring>
#include <string>

namespace tvm {
namespace support {

/*! Reads bytes that belong to the caller and must outlive the stream. */
class BytesInStream : public Stream {
 public:
  using Stream::Read;
  using Stream::Write;

  /*! `bytes`: anything with data() and size(). */
  template <typename Bytes>
  explicit BytesInStream(const Bytes& bytes) : next_(bytes.data()), left_(bytes.size()) {}

  size_t Read(void* out, size_t size) final {
    const size_t count = std::min(size, left_);
    if (count != 0) std::memcpy(out, next_, count);
    next_ += count;
    left_ -= count;
    return count;
  }

  size_t Write(const void*, size_t) final {
    TVM_FFI_THROW(InternalError) << "this stream is for reading";
    return 0;
  }

 private:
  const char* next_;
  size_t left_;
};

/*! Appends to a string of the caller's. */
class BytesOutStream : public Stream {
 public:
  using Stream::Read;
  using Stream::Write;

  explicit BytesOutStream(std::string* out) : out_(out) {}

  size_t Read(void*, size_t) final {
    TVM_FFI_THROW(InternalError) << "this stream is for writing";
    return 0;
  }

  size_t Write(const void* data, size_t size) final {
    out_->append(static_cast<const char*>(data), size);
    return size;
  }

 private:
  std::string* out_;
};

}  // namespace support
}  // namespace tvm

#endif  // MLC_COMPILE_SUPPORT_BYTES_IO_H_
