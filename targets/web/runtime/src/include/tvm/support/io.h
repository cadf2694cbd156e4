/*! Byte streams with typed reads and writes. Numbers are little endian on the wire. */
#ifndef MLC_COMPILE_SUPPORT_IO_H_
#define MLC_COMPILE_SUPPORT_IO_H_

#include <cstddef>
#include <cstdint>
#include <type_traits>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the stream format is little endian and this implementation copies memory"
#endif

// The wheel's headers ask whether a stream's bytes are the machine's own.
#ifndef TVM_FFI_IO_NO_ENDIAN_SWAP
#define TVM_FFI_IO_NO_ENDIAN_SWAP 1
#endif

namespace tvm {
namespace support {

/*! How a type is laid out in a stream: static Write(Stream*, const T&) and bool Read(Stream*, T*). */
template <typename T, typename Enable = void>
struct Serializer;

class Stream {
 public:
  virtual ~Stream() = default;

  /*! Read up to `size` bytes; returns how many there were. */
  virtual size_t Read(void* ptr, size_t size) = 0;
  /*! Write `size` bytes; returns how many were written. */
  virtual size_t Write(const void* ptr, size_t size) = 0;

  template <typename T>
  void Write(const T& value) {
    Serializer<T>::Write(this, value);
  }

  /*! False when the stream ended before the value did. */
  template <typename T>
  bool Read(T* value) {
    return Serializer<T>::Read(this, value);
  }

  /*! `count` values without a length in front of them. */
  template <typename T>
  void WriteArray(const T* values, size_t count) {
    if constexpr (std::is_arithmetic_v<T>) {
      if (count != 0) Write(static_cast<const void*>(values), count * sizeof(T));
    } else {
      for (size_t i = 0; i < count; ++i) Write(values[i]);
    }
  }

  template <typename T>
  bool ReadArray(T* values, size_t count) {
    if constexpr (std::is_arithmetic_v<T>) {
      const size_t size = count * sizeof(T);
      return size == 0 || Read(static_cast<void*>(values), size) == size;
    } else {
      for (size_t i = 0; i < count; ++i) {
        if (!Read(values + i)) return false;
      }
      return true;
    }
  }
};

}  // namespace support
}  // namespace tvm

#endif  // MLC_COMPILE_SUPPORT_IO_H_
