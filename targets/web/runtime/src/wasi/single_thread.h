/*!
 * Included before every C++ source of a wasm32-wasi build: zig's libc++ for that target is built
 * without threads and then has no std::mutex and no std::this_thread. One thread needs no lock.
 */
#ifndef MLC_COMPILE_WASI_SINGLE_THREAD_H_
#define MLC_COMPILE_WASI_SINGLE_THREAD_H_

#include <chrono>
#include <mutex>

#if defined(__wasi__) && defined(_LIBCPP_HAS_THREADS) && !_LIBCPP_HAS_THREADS

namespace std {

struct mutex {
  constexpr mutex() noexcept = default;
  mutex(const mutex&) = delete;
  void lock() {}
  bool try_lock() { return true; }
  void unlock() {}
};

struct recursive_mutex {
  constexpr recursive_mutex() noexcept = default;
  recursive_mutex(const recursive_mutex&) = delete;
  void lock() {}
  bool try_lock() { return true; }
  void unlock() {}
};

template <class... Mutexes>
struct scoped_lock {
  explicit scoped_lock(Mutexes&...) {}
};

// Waiting for something that no other thread can do would never end: trap instead.
struct condition_variable {
  void notify_one() noexcept {}
  void notify_all() noexcept {}
  template <class Lock>
  void wait(Lock&) {
    __builtin_trap();
  }
  template <class Lock, class Predicate>
  void wait(Lock&, Predicate done) {
    if (!done()) __builtin_trap();
  }
};

namespace this_thread {
inline void yield() noexcept {}
template <class Rep, class Period>
void sleep_for(const chrono::duration<Rep, Period>&) {}
}  // namespace this_thread

}  // namespace std

#endif
#endif  // MLC_COMPILE_WASI_SINGLE_THREAD_H_
