/*!
 * `throw` in a build that can't catch (-fignore-exceptions): write what was thrown to stderr, which
 * the JavaScript side prints to the console, and abort. The same for memory that is not to be had.
 */
#include <tvm/ffi/error.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <new>
#include <typeinfo>

// The type information of a class with exactly one base, at offset 0 (Itanium C++ ABI, 2.9.5).
extern "C" const void* const _ZTVN10__cxxabiv120__si_class_type_infoE[];

namespace {

struct SingleBaseTypeInfo {
  const void* vtable;
  const char* name;
  const std::type_info* base;
};

/*! Whether an object of type `type` starts with a std::exception. */
bool IsStdException(const std::type_info* type) {
  while (*type != typeid(std::exception)) {
    const auto* layout = reinterpret_cast<const SingleBaseTypeInfo*>(type);
    // A vtable pointer points behind the offset and the type information.
    if (layout->vtable != _ZTVN10__cxxabiv120__si_class_type_infoE + 2) return false;
    type = layout->base;
  }
  return true;
}

void* Allocate(size_t size) {
  void* space = std::malloc(size != 0 ? size : 1);
  if (space == nullptr) {
    std::fprintf(stderr, "out of memory: %zu bytes of the page's main memory asked for\n", size);
    std::abort();
  }
  return space;
}

}  // namespace

void* operator new(size_t size) { return Allocate(size); }
void* operator new[](size_t size) { return Allocate(size); }
void operator delete(void* space) noexcept { std::free(space); }
void operator delete[](void* space) noexcept { std::free(space); }
void operator delete(void* space, size_t) noexcept { std::free(space); }
void operator delete[](void* space, size_t) noexcept { std::free(space); }

namespace __cxxabiv1 {
extern "C" {

void* __cxa_allocate_exception(size_t size) noexcept { return Allocate(size); }

void __cxa_free_exception(void* space) noexcept { std::free(space); }

[[noreturn]] void __cxa_throw(void* thrown, std::type_info* type, void (*)(void*)) {
  if (*type == typeid(tvm::ffi::Error)) {
    const auto* error = static_cast<const tvm::ffi::Error*>(thrown);
    std::fprintf(stderr, "%s: %s\n%s", error->kind().c_str(), error->what(),
                 error->TracebackMostRecentCallLast().c_str());
  } else if (IsStdException(type)) {
    const auto* error = static_cast<const std::exception*>(thrown);
    std::fprintf(stderr, "C++ exception %s: %s\n", type->name(), error->what());
  } else {
    std::fprintf(stderr, "C++ exception of type %s\n", type->name());
  }
  std::abort();
}

[[noreturn]] void __cxa_rethrow() {
  std::fputs("C++ exception thrown again\n", stderr);
  std::abort();
}

}  // extern "C"
}  // namespace __cxxabiv1
