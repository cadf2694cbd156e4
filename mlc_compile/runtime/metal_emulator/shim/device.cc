// The emulated `metal` device: memory of the host, and modules whose kernels the host's compiler
// translates when they are first launched.
#include <tvm/ffi/cast.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>
#include <tvm/runtime/device_api.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <sstream>

#include "fibre.h"

namespace {

namespace ffi = tvm::ffi;
using tvm::runtime::DeviceAttrKind;

struct allocation {
  char* data;
  size_t bytes;
  std::vector<char> cells;  // of the race check, made when it is wanted
  unsigned granule = 0;
};

// By the address after the last byte, so that upper_bound finds what holds an address.
std::mutex memory_lock;
std::map<const char*, allocation> memory;
size_t allocated = 0, peak = 0;

allocation* find(const void* p) {
  auto at = memory.upper_bound(static_cast<const char*>(p));
  if (at == memory.end() || p < at->second.data) return nullptr;
  return &at->second;
}

class Device final : public tvm::runtime::DeviceAPI {
 public:
  void SetDevice(tvm::Device) final {}

  void GetAttr(tvm::Device device, DeviceAttrKind kind, ffi::Any* value) final {
    using namespace tvm::runtime;
    if (kind == kExist) *value = device.device_id == 0 ? 1 : 0;
    if (kind == kMaxThreadsPerBlock) *value = static_cast<int64_t>(msl_max_threads());
    if (kind == kWarpSize) *value = static_cast<int64_t>(msl::kLanes);
    if (kind == kMaxSharedMemoryPerBlock) *value = 32 << 10;
    if (kind == kDeviceName) *value = ffi::String("emulated Metal");
    if (kind == kTotalGlobalMemory) *value = int64_t{8} << 30;
  }

  void* AllocDataSpace(tvm::Device, size_t bytes, size_t alignment, DLDataType) final {
    // One byte more: an empty buffer, too, has an address of its own.
    void* p = nullptr;
    if (posix_memalign(&p, alignment < 256 ? 256 : alignment, bytes + 1))
      TVM_FFI_THROW(RuntimeError) << "metal emulator: no memory for " << bytes << " bytes";
    memset(p, 0xFF, bytes + 1);  // NaN, or -1
    std::lock_guard<std::mutex> hold(memory_lock);
    char* data = static_cast<char*>(p);
    memory[data + bytes + 1] = {data, bytes, {}, 0};
    allocated += bytes;
    if (allocated > peak) peak = allocated;
    return p;
  }

  void FreeDataSpace(tvm::Device, void* p) final {
    std::lock_guard<std::mutex> hold(memory_lock);
    allocation* a = find(p);
    if (!a || a->data != p) TVM_FFI_THROW(RuntimeError) << "metal emulator: freed twice";
    allocated -= a->bytes;
    memory.erase(a->data + a->bytes + 1);
    free(p);
  }

  void StreamSync(tvm::Device, TVMStreamHandle) final {}

 protected:
  void CopyDataFromTo(const void* from, size_t from_offset, void* to, size_t to_offset,
                      size_t bytes, tvm::Device from_device, tvm::Device to_device, DLDataType,
                      TVMStreamHandle) final {
    check(from_device, from, from_offset, bytes);
    check(to_device, to, to_offset, bytes);
    memmove(static_cast<char*>(to) + to_offset, static_cast<const char*>(from) + from_offset,
            bytes);
  }

 private:
  void check(tvm::Device device, const void* p, size_t offset, size_t bytes) {
    if (device.device_type != kDLMetal || bytes == 0) return;
    std::lock_guard<std::mutex> hold(memory_lock);
    allocation* a = find(p);
    size_t start = a ? static_cast<const char*>(p) - a->data + offset : 0;
    if (!a || start + bytes > a->bytes)
      TVM_FFI_THROW(RuntimeError) << "metal emulator: a copy of " << bytes
                                  << " bytes is not within one device buffer";
  }
};

struct record {
  std::string kernel;
  unsigned grid[3], block[3];
  double seconds;
};
bool recording = false;
std::vector<record> records;
int mode = 1;

struct entry {
  std::vector<std::string> types;  // "handle", "int32", …
  std::vector<std::string> tags;   // "blockIdx.x", …
  const msl::kernel* compiled[3] = {nullptr, nullptr, nullptr};
};

class Module final : public ffi::ModuleObj {
 public:
  Module(int64_t number, ffi::Bytes bytes, ffi::String source)
      : number_(number), bytes_(bytes), source_(source) {}

  const char* kind() const final { return "metal"; }
  int GetPropertyMask() const final {
    return ffi::Module::kRunnable | ffi::Module::kBinarySerializable;
  }
  ffi::Bytes SaveToBytes() const final { return bytes_; }
  ffi::String InspectSource(const ffi::String&) const final { return source_; }

  void Add(const std::string& name, entry e) { kernels_[name] = std::move(e); }

  ffi::Optional<ffi::Function> GetFunction(const ffi::String& name) final {
    auto at = kernels_.find(name);
    if (at == kernels_.end()) return std::nullopt;
    std::string key = at->first;
    ffi::Module keep = ffi::GetRef<ffi::Module>(this);
    return ffi::Function::FromPacked(
        [this, keep, key](const ffi::AnyView* args, int32_t count, ffi::Any* result) {
          Launch(key, args, count);
          *result = nullptr;
        });
  }

 private:
  void Launch(const std::string& name, const ffi::AnyView* args, int32_t count) {
    entry& e = kernels_[name];
    if (count != static_cast<int32_t>(e.types.size() + e.tags.size()))
      TVM_FFI_THROW(RuntimeError) << "metal emulator: " << name << " takes "
                                  << e.types.size() + e.tags.size() << " arguments, not " << count;
    if (!e.compiled[mode]) {
      static ffi::Function compile =
          ffi::Function::GetGlobalRequired("mlc_compile.metal_emulator.compile");
      int64_t address = compile(number_, name, mode).cast<int64_t>();
      e.compiled[mode] = reinterpret_cast<const msl::kernel*>(address);
    }
    const msl::kernel& kernel = *e.compiled[mode];
    msl::group group{};
    msl::buffer buffers[msl::kMaxBuffers];
    std::vector<uint64_t> constants(e.types.size() + 1);
    unsigned buffer = 0, constant = 0;
    for (size_t i = 0; i < e.types.size(); i++) {
      const std::string& type = e.types[i];
      if (type == "handle") {
        Bind(kernel, buffers, buffer++, args[i].cast<void*>());
      } else if (type.rfind("float", 0) == 0) {
        float value = static_cast<float>(args[i].cast<double>());
        memcpy(&constants[constant++], &value, 4);
      } else {
        int64_t value = args[i].cast<int64_t>();
        memcpy(&constants[constant++], &value, 8);
      }
    }
    if (buffer != kernel.buffer_count)
      TVM_FFI_THROW(RuntimeError) << "metal emulator: " << name << " has " << kernel.buffer_count
                                  << " buffers, the launch " << buffer;
    for (int i = 0; i < 3; i++) group.grid[i] = group.block[i] = 1;
    for (size_t i = 0; i < e.tags.size(); i++) {
      const std::string& tag = e.tags[i];
      unsigned* extents = tag.rfind("blockIdx.", 0) == 0    ? group.grid
                          : tag.rfind("threadIdx.", 0) == 0 ? group.block
                                                            : nullptr;
      if (!extents)
        TVM_FFI_THROW(RuntimeError) << "metal emulator: " << name << ": unknown launch parameter "
                                    << tag;
      int64_t extent = args[e.types.size() + i].cast<int64_t>();
      if (extent < 0 || extent > 0x7FFFFFFF)
        TVM_FFI_THROW(RuntimeError) << "metal emulator: " << name << ": " << tag << " of "
                                    << extent;
      extents[tag.back() - 'x'] = static_cast<unsigned>(extent);
    }
    uint64_t threads = uint64_t{group.block[0]} * group.block[1] * group.block[2];
    if (threads > msl_max_threads())
      TVM_FFI_THROW(RuntimeError) << "metal emulator: " << name << ": " << threads
                                  << " threads in a threadgroup, the limit is "
                                  << msl_max_threads();
    if (!threads || !group.grid[0] || !group.grid[1] || !group.grid[2]) return;
    group.threads = static_cast<unsigned>(threads);
    group.buffers = buffers;
    group.constants = reinterpret_cast<const char*>(constants.data());
    auto start = std::chrono::steady_clock::now();
    std::string fault = msl_run(kernel, group);
    if (recording) {
      std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
      record r{name, {}, {}, took.count()};
      memcpy(r.grid, group.grid, sizeof r.grid);
      memcpy(r.block, group.block, sizeof r.block);
      records.push_back(r);
    }
    if (!fault.empty()) TVM_FFI_THROW(RuntimeError) << "metal emulator: " << fault;
  }

  void Bind(const msl::kernel& kernel, msl::buffer* buffers, unsigned i, void* p) {
    if (i >= kernel.buffer_count) return;  // counted afterwards
    std::lock_guard<std::mutex> hold(memory_lock);
    allocation* a = find(p);
    if (!a)
      TVM_FFI_THROW(RuntimeError) << "metal emulator: " << kernel.name << ": buffer(" << i << ") '"
                                  << kernel.buffer_names[i]
                                  << "' is not in memory of the device, or was freed";
    buffers[i] = {static_cast<char*>(p), a->data, a->bytes, nullptr, kernel.buffer_names[i]};
    if (kernel.mode < 2) return;
    // Only what the launch writes can be raced for, whichever argument names it.
    bool written = kernel.buffer_written[i];
    for (unsigned k = 0; k < i; k++)
      if (buffers[k].low == a->data) written |= buffers[k].cells != nullptr;
    if (!written) return;
    if (a->granule != kernel.granule) {
      a->cells.assign((a->bytes / kernel.granule + 1) * sizeof(msl::cell), 0);
      a->granule = kernel.granule;
    }
    for (unsigned k = 0; k <= i; k++)
      if (buffers[k].low == a->data) buffers[k].cells = reinterpret_cast<msl::cell*>(a->cells.data());
  }

  int64_t number_;
  ffi::Bytes bytes_;
  ffi::String source_;
  std::map<std::string, entry> kernels_;
};

std::vector<std::string> split(const std::string& words) {
  std::vector<std::string> found;
  std::istringstream in(words);
  for (std::string word; in >> word;) found.push_back(word);
  return found;
}

// kernels: name, argument types and launch parameters (words with blanks between) of each.
ffi::Module MakeModule(int64_t number, ffi::Bytes bytes, ffi::String source,
                       ffi::Array<ffi::String> kernels) {
  ffi::ObjectPtr<Module> made = ffi::make_object<Module>(number, bytes, source);
  for (size_t i = 0; i + 2 < kernels.size(); i += 3)
    made->Add(kernels[i], {split(kernels[i + 1]), split(kernels[i + 2])});
  return ffi::Module(made);
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void msl_register() {
  ffi::Function::SetGlobal("device_api.metal",
                           ffi::Function::FromPacked([](const ffi::AnyView*, int32_t, ffi::Any* r) {
                             static Device* device = new Device();  // outlives every tensor
                             tvm::runtime::DeviceAPI* api = device;
                             *r = static_cast<void*>(api);
                           }),
                           true);
  ffi::Function::SetGlobal("mlc_compile.metal_emulator.module",
                           ffi::Function::FromTyped(MakeModule), true);
}

// 0 unchecked, 1 checked, 2 races as well: of the launches that follow.
__attribute__((visibility("default"))) void msl_mode(int chosen) { mode = chosen; }

__attribute__((visibility("default"))) size_t msl_peak_bytes() { return peak; }

__attribute__((visibility("default"))) void msl_record(int on) {
  recording = on;
  if (on) records.clear();
}
__attribute__((visibility("default"))) size_t msl_record_count() { return records.size(); }
__attribute__((visibility("default"))) const char* msl_record_at(size_t i, unsigned* extents,
                                                                 double* seconds) {
  const record& r = records[i];
  memcpy(extents, r.grid, sizeof r.grid);
  memcpy(extents + 3, r.block, sizeof r.block);
  *seconds = r.seconds;
  return r.kernel.c_str();
}

}  // extern "C"
