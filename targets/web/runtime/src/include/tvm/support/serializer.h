/*!
 * The stream layout of the types that TVM's runtime reads and writes.
 *
 * Numbers and enums: their bytes. DLDataType: code u8, bits u8, lanes u16. DLDevice: type i32, id i32.
 * Strings, vectors, arrays: u64 length, then the elements. Maps: u64 length, then key, value, key, ….
 */
#ifndef MLC_COMPILE_SUPPORT_SERIALIZER_H_
#define MLC_COMPILE_SUPPORT_SERIALIZER_H_

#include <dlpack/dlpack.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/string.h>
#include <tvm/support/io.h>

#include <limits>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

namespace tvm {
namespace support {

namespace details {

inline void WriteLength(Stream* stream, size_t length) {
  stream->Write(static_cast<uint64_t>(length));
}

/*! False at the end of the stream, or when the length is none that this machine can hold. */
inline bool ReadLength(Stream* stream, size_t* length) {
  uint64_t value;
  if (!stream->Read(&value) || value > std::numeric_limits<size_t>::max() / 2) return false;
  *length = static_cast<size_t>(value);
  return true;
}

template <typename Map>
void WriteMap(Stream* stream, const Map& map) {
  WriteLength(stream, map.size());
  for (const auto& item : map) {
    stream->Write(item.first);
    stream->Write(item.second);
  }
}

/*! A value to read into: our own containers' element types need not be default constructible. */
template <typename T>
T Blank() {
  if constexpr (std::is_constructible_v<T, ffi::UnsafeInit>) {
    return T(ffi::UnsafeInit());
  } else {
    return T();
  }
}

}  // namespace details

template <typename T>
struct Serializer<T, std::enable_if_t<std::is_arithmetic_v<T> || std::is_enum_v<T>>> {
  static constexpr bool enabled = true;
  static void Write(Stream* stream, const T& value) {
    stream->Write(static_cast<const void*>(&value), sizeof(T));
  }
  static bool Read(Stream* stream, T* value) {
    return stream->Read(static_cast<void*>(value), sizeof(T)) == sizeof(T);
  }
};

template <>
struct Serializer<DLDataType> {
  static constexpr bool enabled = true;
  static void Write(Stream* stream, const DLDataType& type) {
    stream->Write(type.code);
    stream->Write(type.bits);
    stream->Write(type.lanes);
  }
  static bool Read(Stream* stream, DLDataType* type) {
    return stream->Read(&type->code) && stream->Read(&type->bits) && stream->Read(&type->lanes);
  }
};

template <>
struct Serializer<DLDevice> {
  static constexpr bool enabled = true;
  static void Write(Stream* stream, const DLDevice& device) {
    stream->Write(static_cast<int32_t>(device.device_type));
    stream->Write(static_cast<int32_t>(device.device_id));
  }
  static bool Read(Stream* stream, DLDevice* device) {
    int32_t type, id;
    if (!stream->Read(&type) || !stream->Read(&id)) return false;
    device->device_type = static_cast<DLDeviceType>(type);
    device->device_id = id;
    return true;
  }
};

template <>
struct Serializer<std::string> {
  static constexpr bool enabled = true;
  static void Write(Stream* stream, const std::string& text) {
    details::WriteLength(stream, text.size());
    stream->WriteArray(text.data(), text.size());
  }
  static bool Read(Stream* stream, std::string* text) {
    size_t length;
    if (!details::ReadLength(stream, &length)) return false;
    text->resize(length);
    return stream->ReadArray(text->data(), length);
  }
};

template <>
struct Serializer<ffi::String> {
  static constexpr bool enabled = true;
  static void Write(Stream* stream, const ffi::String& text) {
    details::WriteLength(stream, text.size());
    stream->WriteArray(text.data(), text.size());
  }
  static bool Read(Stream* stream, ffi::String* text) {
    std::string copy;
    if (!stream->Read(&copy)) return false;
    *text = ffi::String(std::move(copy));
    return true;
  }
};

template <typename First, typename Second>
struct Serializer<std::pair<First, Second>> {
  static constexpr bool enabled = true;
  static void Write(Stream* stream, const std::pair<First, Second>& pair) {
    stream->Write(pair.first);
    stream->Write(pair.second);
  }
  static bool Read(Stream* stream, std::pair<First, Second>* pair) {
    return stream->Read(&pair->first) && stream->Read(&pair->second);
  }
};

template <typename T>
struct Serializer<std::vector<T>> {
  static constexpr bool enabled = true;
  static void Write(Stream* stream, const std::vector<T>& values) {
    details::WriteLength(stream, values.size());
    stream->WriteArray(values.data(), values.size());
  }
  static bool Read(Stream* stream, std::vector<T>* values) {
    size_t length;
    if (!details::ReadLength(stream, &length)) return false;
    values->resize(length);
    return stream->ReadArray(values->data(), length);
  }
};

template <typename T>
struct Serializer<ffi::Array<T>> {
  static constexpr bool enabled = true;
  static void Write(Stream* stream, const ffi::Array<T>& values) {
    details::WriteLength(stream, values.size());
    for (T value : values) stream->Write(value);
  }
  static bool Read(Stream* stream, ffi::Array<T>* values) {
    size_t length;
    if (!details::ReadLength(stream, &length)) return false;
    ffi::Array<T> result;
    for (size_t i = 0; i < length; ++i) {
      T value = details::Blank<T>();
      if (!stream->Read(&value)) return false;
      result.push_back(std::move(value));
    }
    *values = std::move(result);
    return true;
  }
};

template <typename Key, typename Value>
struct Serializer<std::unordered_map<Key, Value>> {
  static constexpr bool enabled = true;
  static void Write(Stream* stream, const std::unordered_map<Key, Value>& map) {
    details::WriteMap(stream, map);
  }
  static bool Read(Stream* stream, std::unordered_map<Key, Value>* map) {
    size_t length;
    if (!details::ReadLength(stream, &length)) return false;
    std::unordered_map<Key, Value> result;
    for (size_t i = 0; i < length; ++i) {
      Key key;
      Value value;
      if (!stream->Read(&key) || !stream->Read(&value)) return false;
      result.emplace(std::move(key), std::move(value));
    }
    *map = std::move(result);
    return true;
  }
};

template <typename Key, typename Value>
struct Serializer<ffi::Map<Key, Value>> {
  static constexpr bool enabled = true;
  static void Write(Stream* stream, const ffi::Map<Key, Value>& map) {
    details::WriteMap(stream, map);
  }
  static bool Read(Stream* stream, ffi::Map<Key, Value>* map) {
    size_t length;
    if (!details::ReadLength(stream, &length)) return false;
    ffi::Map<Key, Value> result;
    for (size_t i = 0; i < length; ++i) {
      Key key = details::Blank<Key>();
      Value value = details::Blank<Value>();
      if (!stream->Read(&key) || !stream->Read(&value)) return false;
      result.Set(std::move(key), std::move(value));
    }
    *map = std::move(result);
    return true;
  }
};

}  // namespace support
}  // namespace tvm

#endif  // MLC_COMPILE_SUPPORT_SERIALIZER_H_
