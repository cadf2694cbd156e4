// The emulated `cuda` device: memory of the host, modules whose kernels the host's compiler
// translates when they are first launched, and graphs of launches.
#include <tvm/ffi/cast.h>
#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/shape.h>
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

extern "C" {
const char* emu_launch(const char* name, const unsigned* grid, const unsigned* block,
                       unsigned shared_bytes, void (*thread)(void*), void* argument,
                       const void* library);
void* emu_allocate(size_t bytes, const char* name);
void emu_release(void* p);
int emu_is_buffer(const void* p, size_t bytes);
void emu_dependent(int on);
}

namespace {

namespace ffi = tvm::ffi;
using tvm::runtime::DeviceAttrKind;
using thread_function = void (*)(void*);

int capability = 80;
std::mutex device_lock;

struct launch {
  std::string name;
  thread_function thread = nullptr;
  std::vector<uint64_t> arguments;
  unsigned grid[3], block[3], shared_bytes = 0;
  bool dependent = false;
};

struct copy {
  const void* from;
  void* to;
  size_t bytes;
};

// What a graph has captured, in order: launches and copies on the device.
struct step {
  launch run;
  copy move{};
};
struct graph {
  std::vector<step> steps;
};
graph* capturing = nullptr;

struct record {
  std::string kernel;
  unsigned grid[3], block[3], shared_bytes;
  bool replayed, dependent;
  double seconds;
};
bool recording = false;
std::vector<record> records;

void run(const launch& l, bool replayed) {
  auto start = std::chrono::steady_clock::now();
  std::lock_guard<std::mutex> hold(device_lock);
  bool dependent = l.dependent && capability >= 90;
  emu_dependent(dependent);
  std::string fault =
      emu_launch(l.name.c_str(), l.grid, l.block, l.shared_bytes, l.thread,
                 const_cast<uint64_t*>(l.arguments.data()), reinterpret_cast<void*>(l.thread));
  if (recording) {
    std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    record r{l.name, {}, {}, l.shared_bytes, replayed, dependent, took.count()};
    memcpy(r.grid, l.grid, sizeof r.grid);
    memcpy(r.block, l.block, sizeof r.block);
    records.push_back(r);
  }
  if (!fault.empty()) TVM_FFI_THROW(RuntimeError) << "CUDA emulator: " << fault;
}

class Device final : public tvm::runtime::DeviceAPI {
 public:
  void SetDevice(tvm::Device) final {}

  void GetAttr(tvm::Device device, DeviceAttrKind kind, ffi::Any* value) final {
    using namespace tvm::runtime;
    if (kind == kExist) *value = device.device_id == 0 ? 1 : 0;
    if (kind == kMaxThreadsPerBlock) *value = 1024;
    if (kind == kWarpSize) *value = 32;
    if (kind == kMaxSharedMemoryPerBlock) *value = 48 << 10;
    if (kind == kComputeVersion)
      *value = ffi::String(std::to_string(capability / 10) + "." + std::to_string(capability % 10));
    if (kind == kDeviceName) *value = ffi::String("emulated CUDA");
    if (kind == kMaxClockRate) *value = 1000000;
    if (kind == kMultiProcessorCount) *value = 4;
    if (kind == kMaxThreadDimensions) *value = ffi::String("[1024, 1024, 64]");
    if (kind == kMaxRegistersPerBlock) *value = 65536;
    if (kind == kApiVersion || kind == kDriverVersion) *value = 13000;
    if (kind == kL2CacheSizeBytes) *value = 1 << 20;
    if (kind == kTotalGlobalMemory || kind == kAvailableGlobalMemory) *value = int64_t{8} << 30;
  }

  void* AllocDataSpace(tvm::Device device, size_t bytes, size_t alignment, DLDataType) final {
    std::lock_guard<std::mutex> hold(device_lock);
    void* p = nullptr;
    if (device.device_type == kDLCUDAHost) {
      if (posix_memalign(&p, alignment < 64 ? 64 : alignment, bytes + 1)) p = nullptr;
    } else {
      p = emu_allocate(bytes, "a buffer");
    }
    if (!p) TVM_FFI_THROW(RuntimeError) << "CUDA emulator: no memory for " << bytes << " bytes";
    return p;
  }

  void FreeDataSpace(tvm::Device device, void* p) final {
    std::lock_guard<std::mutex> hold(device_lock);
    if (device.device_type == kDLCUDAHost) {
      free(p);
    } else {
      emu_release(p);
    }
  }

  void StreamSync(tvm::Device, TVMStreamHandle) final {
    if (capturing) TVM_FFI_THROW(RuntimeError) << "CUDA emulator: the host waits inside of a graph";
  }

 protected:
  void CopyDataFromTo(const void* from, size_t from_offset, void* to, size_t to_offset,
                      size_t bytes, tvm::Device from_device, tvm::Device to_device, DLDataType,
                      TVMStreamHandle) final {
    from = static_cast<const char*>(from) + from_offset;
    to = static_cast<char*>(to) + to_offset;
    if (!bytes) return;
    std::lock_guard<std::mutex> hold(device_lock);
    bool on_device = from_device.device_type == kDLCUDA && to_device.device_type == kDLCUDA;
    if ((from_device.device_type == kDLCUDA && !emu_is_buffer(from, bytes)) ||
        (to_device.device_type == kDLCUDA && !emu_is_buffer(to, bytes)))
      TVM_FFI_THROW(RuntimeError) << "CUDA emulator: a copy of " << bytes
                                  << " bytes is not within one device buffer";
    if (capturing) {
      if (!on_device)
        TVM_FFI_THROW(RuntimeError) << "CUDA emulator: a copy from or to the host inside of a graph";
      capturing->steps.push_back({{}, {from, to, bytes}});
      return;
    }
    memmove(to, from, bytes);
  }
};

struct entry {
  std::vector<std::string> types;  // "handle", "int32", …
  std::vector<std::string> tags;   // "blockIdx.x", …
  std::map<int, thread_function> compiled;  // by the number of a way to compile
};
int way = 0;

class Module final : public ffi::ModuleObj {
 public:
  Module(int64_t number, ffi::Bytes bytes, ffi::String source)
      : number_(number), bytes_(bytes), source_(source) {}

  const char* kind() const final { return "cuda"; }
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
    launch l;
    l.name = name;
    size_t extents = 0;
    bool dynamic = false;
    for (const std::string& tag : e.tags) {
      if (tag == "tirx.use_dyn_shared_memory") dynamic = true;
      if (tag == "tirx.use_programtic_dependent_launch") l.dependent = true;
      extents += tag.rfind("tirx.", 0) != 0;
    }
    size_t wanted = e.types.size() + extents + dynamic;
    if (count != static_cast<int32_t>(wanted))
      TVM_FFI_THROW(RuntimeError) << "CUDA emulator: " << name << " takes " << wanted
                                  << " arguments, not " << count;
    for (size_t i = 0; i < e.types.size(); i++) {
      const std::string& type = e.types[i];
      uint64_t word = 0;
      if (type == "handle") {
        void* p = args[i].cast<void*>();
        word = reinterpret_cast<uintptr_t>(p);
        std::lock_guard<std::mutex> hold(device_lock);
        if (p && !emu_is_buffer(p, 0))
          TVM_FFI_THROW(RuntimeError) << "CUDA emulator: " << name << ": argument " << i
                                      << " is not in memory of the device, or was freed";
      } else if (type.find("float") != std::string::npos) {
        double value = args[i].cast<double>();
        memcpy(&word, &value, 8);
      } else {
        word = static_cast<uint64_t>(args[i].cast<int64_t>());
      }
      l.arguments.push_back(word);
    }
    for (int i = 0; i < 3; i++) l.grid[i] = l.block[i] = 1;
    size_t at = e.types.size();
    for (const std::string& tag : e.tags) {
      if (tag.rfind("tirx.", 0) == 0) continue;
      unsigned* where = tag.rfind("blockIdx.", 0) == 0    ? l.grid
                        : tag.rfind("threadIdx.", 0) == 0 ? l.block
                                                          : nullptr;
      if (!where)
        TVM_FFI_THROW(RuntimeError) << "CUDA emulator: " << name << ": unknown launch parameter "
                                    << tag;
      int64_t extent = args[at++].cast<int64_t>();
      if (extent < 0 || extent > 0x7FFFFFFF)
        TVM_FFI_THROW(RuntimeError) << "CUDA emulator: " << name << ": " << tag << " of "
                                    << extent;
      // As TVM's runtime does: an extent that a shape makes 0 is launched as 1.
      where[tag.back() - 'x'] = extent ? static_cast<unsigned>(extent) : 1;
    }
    if (dynamic) l.shared_bytes = static_cast<unsigned>(args[at].cast<int64_t>());
    auto found = e.compiled.find(way);
    if (found == e.compiled.end()) {
      static ffi::Function compile =
          ffi::Function::GetGlobalRequired("mlc_compile.cuda_emulator.compile");
      int64_t address = compile(number_, name).cast<int64_t>();
      found = e.compiled.emplace(way, reinterpret_cast<thread_function>(address)).first;
    }
    l.thread = found->second;
    if (capturing) {
      capturing->steps.push_back({l, {}});
      return;
    }
    run(l, false);
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
    made->Add(kernels[i], {split(kernels[i + 1]), split(kernels[i + 2]), {}});
  return ffi::Module(made);
}

// ---- graphs: the first call runs the function, then captures it; later ones replay. Source of the
// protocol: src/runtime/vm/cuda/cuda_graph_builtin.cc of TVM 0.27.

// As TVM's vm.h has it, which the wheel's headers don't suffice for.
class Closure : public ffi::Object {
 public:
  ffi::String func_name;
  ffi::Function impl;
  TVM_FFI_DECLARE_OBJECT_INFO_FINAL("relax.vm.Closure", Closure, ffi::Object);
};

ffi::Any call(ffi::AnyView vm, const ffi::ObjectRef& function, const ffi::Array<ffi::Any>& given) {
  std::vector<ffi::AnyView> packed;
  const auto* closure = function.as<Closure>();
  if (closure) packed.push_back(vm);
  for (const ffi::Any& argument : given) packed.push_back(argument);
  ffi::Any value;
  ffi::PackedArgs arguments(packed.data(), static_cast<int>(packed.size()));
  if (closure) {
    closure->impl.CallPacked(arguments, &value);
  } else {
    ffi::Any(function).cast<ffi::Function>().CallPacked(arguments, &value);
  }
  return value;
}

// The function is each virtual machine's own; it is held, so that its address stays its name.
struct captured {
  ffi::ObjectRef function, states;
  graph steps;
};
using graph_key = std::pair<const void*, std::vector<int64_t>>;
auto& graphs = *new std::map<graph_key, captured>();
auto& allocations = *new std::map<graph_key, std::pair<ffi::ObjectRef, ffi::ObjectRef>>();

void run_or_capture(const ffi::AnyView* args, int32_t count, ffi::Any* result) {
  auto function = args[1].cast<ffi::ObjectRef>();
  graph_key key{function.get(), {args[3].cast<int64_t>()}};
  if (count == 5)
    for (int64_t extent : args[4].cast<ffi::Shape>()) key.second.push_back(extent);
  auto found = graphs.find(key);
  if (found != graphs.end()) {
    for (const step& s : found->second.steps.steps) {
      if (s.run.thread) {
        run(s.run, true);
      } else {
        memmove(s.move.to, s.move.from, s.move.bytes);
      }
    }
    *result = found->second.states;
    return;
  }
  auto given = args[2].cast<ffi::Array<ffi::Any>>();
  call(args[0], function, given);
  captured made;
  made.function = function;
  capturing = &made.steps;
  try {
    made.states = call(args[0], function, given).cast<ffi::ObjectRef>();
  } catch (...) {
    capturing = nullptr;
    throw;
  }
  capturing = nullptr;
  *result = made.states;
  graphs.emplace(key, std::move(made));
}

void cached_allocation(const ffi::AnyView* args, int32_t, ffi::Any* result) {
  auto function = args[1].cast<ffi::ObjectRef>();
  graph_key key{function.get(), {args[2].cast<int64_t>()}};
  auto found = allocations.find(key);
  if (found == allocations.end()) {
    auto made = call(args[0], function, {}).cast<ffi::ObjectRef>();
    found = allocations.emplace(key, std::make_pair(function, made)).first;
  }
  *result = found->second.second;
}

}  // namespace

extern "C" {

#define EMU_EXPORT __attribute__((visibility("default")))

EMU_EXPORT void emu_register_device() {
  auto device = ffi::Function::FromPacked([](const ffi::AnyView*, int32_t, ffi::Any* r) {
    static Device* device = new Device();  // outlives every tensor
    tvm::runtime::DeviceAPI* api = device;
    *r = static_cast<void*>(api);
  });
  ffi::Function::SetGlobal("device_api.cuda", device, true);
  ffi::Function::SetGlobal("device_api.cuda_host", device, true);
  ffi::Function::SetGlobal("mlc_compile.cuda_emulator.module", ffi::Function::FromTyped(MakeModule),
                           true);
  ffi::Function::SetGlobal("vm.builtin.cuda_graph.run_or_capture",
                           ffi::Function::FromPacked(run_or_capture), true);
  ffi::Function::SetGlobal("vm.builtin.cuda_graph.get_cached_alloc",
                           ffi::Function::FromPacked(cached_allocation), true);
}

// way: names how kernels that are launched from now on are compiled.
EMU_EXPORT void emu_device_options(int arch, int chosen_way) {
  capability = arch;
  way = chosen_way;
}

EMU_EXPORT void emu_record(int on) {
  recording = on;
  if (on) records.clear();
}
EMU_EXPORT size_t emu_record_count() { return records.size(); }
// numbers: grid, block, bytes of dynamic shared memory, whether a graph replayed it, whether it was
// a dependent launch.
EMU_EXPORT const char* emu_record_at(size_t i, unsigned* numbers, double* seconds) {
  const record& r = records[i];
  memcpy(numbers, r.grid, sizeof r.grid);
  memcpy(numbers + 3, r.block, sizeof r.block);
  numbers[6] = r.shared_bytes;
  numbers[7] = r.replayed;
  numbers[8] = r.dependent;
  *seconds = r.seconds;
  return r.kernel.c_str();
}

}  // extern "C"
