// What a translated kernel and the emulator's core share: launches, memory and its checks.
//
// MSL_MODE 0: plain pointers. 1: every access within its buffer and aligned. 2: races as well.
// No header of the C library is included here or in metal_stdlib.h: a kernel that uses a function
// that MSL lacks must not find it there.
#pragma once

#ifndef MSL_MODE
#define MSL_MODE 1
#endif
#ifndef MSL_GRANULE
#define MSL_GRANULE 1
#endif

namespace msl {

using size = __SIZE_TYPE__;
using address = __UINTPTR_TYPE__;
using integer = long long;

constexpr unsigned kAbi = 1;
constexpr unsigned kLanes = 32;
constexpr unsigned kMaxBuffers = 32;

// One access that the race check remembers: thread of the whole grid, when it
// was among the memory barriers of its space and of its SIMD group, line of MSL, and when among the
// group's barriers of any kind.
struct touch {
  unsigned long long thread;
  unsigned epoch, simd, line, meeting;
};

// What happened to one granule: its writer, one that wrote the same value, and two readers.
struct cell {
  touch write, rewrite, read, reread;
  bool silent;  // the write changed nothing
};

struct buffer {
  char* data;        // what the kernel was given
  char* low;         // start of its allocation
  size bytes;        // of the allocation
  cell* cells;       // of the allocation; null: not checked for races
  const char* name;
};

struct group {
  const buffer* buffers;
  const char* constants;  // by-value arguments, 8 bytes each
  unsigned grid[3], block[3], at[3];
  unsigned threads;
  const unsigned* order;  // null: ascending
  unsigned* current;      // the thread that runs, for messages
};

struct array {  // threadgroup memory
  const char* name;
  unsigned offset, bytes;
};

// What a kernel's library exports as `msl_kernel`.
struct kernel {
  unsigned abi, mode, granule;
  const char* name;
  bool fibres, simd;  // has barriers; has functions of a SIMD group
  unsigned group_bytes;
  unsigned array_count;
  const array* arrays;
  unsigned buffer_count;
  const char* const* buffer_names;
  const bool* buffer_written;
  void (*one)(const group&, unsigned thread);
  void (*all)(const group&);
};

}  // namespace msl

extern "C" {
[[noreturn]] void msl_bad_access(const void* low, const void* at, unsigned bytes, unsigned align,
                                 int write, unsigned line);
[[noreturn]] void msl_bad_local(const char* name, long long index, unsigned extent, unsigned line);
[[noreturn]] void msl_fault(const char* what, long long value, unsigned line);
void msl_track(msl::cell* cells, msl::size offset, unsigned bytes, int write, const void* value,
               const void* memory, unsigned line, int device);
char* msl_group_memory();
msl::cell* msl_group_cells();
void msl_barrier(int flags, unsigned line);
void msl_simd_wait(int flags, unsigned line);
unsigned msl_lane();
void* msl_slot(unsigned lane);
int msl_lane_active(unsigned lane);
}

namespace msl {

template <class A, class B>
constexpr bool same = false;
template <class A>
constexpr bool same<A, A> = true;
template <class T>
struct plain {
  using type = T;
};
template <class T>
struct plain<const T> {
  using type = T;
};

// An index with the line of MSL that it stands in; `written` and `addressed` mark what the
// translator saw done with the element.
struct index {
  integer i;
  unsigned line;
  constexpr index(integer i, unsigned line = __builtin_LINE()) : i(i), line(line) {}
};
struct written {
  integer i;
  unsigned line;
  constexpr explicit written(integer i, unsigned line = __builtin_LINE()) : i(i), line(line) {}
};
struct addressed {
  integer i;
  unsigned line;
  constexpr explicit addressed(integer i, unsigned line = __builtin_LINE()) : i(i), line(line) {}
};

struct in_device {
  static constexpr int device = 1;
};
struct in_threadgroup {
  static constexpr int device = 0;
};

template <class T, class Space>
struct pointer;

template <class T, class Space>
struct location {  // `&p[i]`
  pointer<T, Space> at;
  constexpr pointer<T, Space> operator&() const { return at; }
};

// The element that a statement writes, so that the race check sees the value.
template <class T, class Space>
struct element {
  T* at;
  cell* cells;
  size offset;
  unsigned line;
  const element& operator=(const T& value) const {
    if (cells) msl_track(cells, offset, sizeof(T), 1, &value, at, line, Space::device);
    *at = value;
    return *this;
  }
  const element& operator=(const element& other) const { return *this = other.read(); }
  T read() const {
    if (cells) msl_track(cells, offset, sizeof(T), 0, nullptr, at, line, Space::device);
    return *at;
  }
  operator T() const { return read(); }
#define MSL_ASSIGN(op) \
  template <class U>   \
  const element& operator op##=(const U& value) const { return *this = (T)(read() op value); }
  MSL_ASSIGN(+) MSL_ASSIGN(-) MSL_ASSIGN(*) MSL_ASSIGN(/) MSL_ASSIGN(%) MSL_ASSIGN(&)
  MSL_ASSIGN(|) MSL_ASSIGN(^) MSL_ASSIGN(<<) MSL_ASSIGN(>>)
#undef MSL_ASSIGN
};

// A pointer of an address space. Each space has its own type, as in MSL.
template <class T, class Space>
struct pointer {
  T* p = nullptr;
#if MSL_MODE >= 1
  char* low = nullptr;
  size bytes = 0;
  unsigned line = 0;
#endif
#if MSL_MODE >= 2
  cell* cells = nullptr;
#endif
  constexpr pointer() = default;
  explicit pointer(const buffer& b) : p((T*)b.data) {
#if MSL_MODE >= 1
    low = b.low;
    bytes = b.bytes;
#endif
#if MSL_MODE >= 2
    cells = b.cells;
#endif
  }
  template <class U>
  constexpr explicit pointer(const pointer<U, Space>& o, unsigned line = __builtin_LINE())
      : p((T*)o.p) {
#if MSL_MODE >= 1
    low = o.low;
    bytes = o.bytes;
    this->line = line;
#endif
#if MSL_MODE >= 2
    cells = o.cells;
#endif
  }
  constexpr operator pointer<const T, Space>() const
    requires(!same<T, const T>)
  {
    return pointer<const T, Space>(*this);
  }
  void check([[maybe_unused]] T* at, [[maybe_unused]] int write,
             [[maybe_unused]] unsigned line) const {
#if MSL_MODE >= 1
    size from = (size)((char*)at - low);
    if (__builtin_expect(bytes < sizeof(T) || from > bytes - sizeof(T), 0))
      msl_bad_access(low, (const void*)at, sizeof(T), 0, write, line);
    if constexpr (alignof(T) > 4)
      if (__builtin_expect((address)at % alignof(T) != 0, 0))
        msl_bad_access(low, (const void*)at, sizeof(T), alignof(T), write, line);
#endif
  }
  const T& get(integer i, unsigned line) const {
    check(p + i, 0, line);
#if MSL_MODE >= 2
    if (cells)
      msl_track(cells, (char*)(p + i) - low, sizeof(T), 0, nullptr, p + i, line, Space::device);
#endif
    return p[i];
  }
#if MSL_MODE >= 2
  element<T, Space> put(integer i, unsigned line) const {
    check(p + i, 1, line);
    return {p + i, cells, (size)((char*)(p + i) - low), line};
  }
#else
  T& put(integer i, unsigned line) const {
    check(p + i, 1, line);
    return p[i];
  }
#endif
  const T& operator[](index x) const { return get(x.i, x.line); }
  decltype(auto) operator[](written x) const { return put(x.i, x.line); }
  location<T, Space> operator[](addressed x) const { return {*this + x.i}; }
  const T& operator*() const { return get(0, at_line()); }
  constexpr pointer operator+(integer i) const {
    pointer r = *this;
    r.p += i;
    return r;
  }
  constexpr pointer operator-(integer i) const { return *this + -i; }
  constexpr unsigned at_line() const {
#if MSL_MODE >= 1
    return line;
#else
    return 0;
#endif
  }
};

// `*(p) = …` as the translator writes it.
template <class T, class Space>
decltype(auto) target(const pointer<T, Space>& p, unsigned line = __builtin_LINE()) {
  return p.put(0, line);
}
template <class T>
T& target(T* p) {
  return *p;
}

template <class T>
using device_pointer = pointer<T, in_device>;
template <class T>
using group_pointer = pointer<T, in_threadgroup>;

// An array of a threadgroup, at its place in the group's memory.
template <class T>
group_pointer<T> group_array(unsigned offset, [[maybe_unused]] unsigned count) {
  group_pointer<T> r;
  r.p = (T*)(msl_group_memory() + offset);
#if MSL_MODE >= 1
  r.low = (char*)r.p;
  r.bytes = count * sizeof(T);
#endif
#if MSL_MODE >= 2
  r.cells = msl_group_cells() + offset / MSL_GRANULE;
#endif
  return r;
}

// An array of a thread.
template <class T, unsigned N>
struct alignas(16) local {
  T d[N];
  integer checked(integer i, [[maybe_unused]] unsigned line) const {
#if MSL_MODE >= 1
    if (__builtin_expect((size)i >= N, 0)) msl_bad_local("", i, N, line);
#endif
    return i;
  }
  T& operator[](index x) { return d[checked(x.i, x.line)]; }
  const T& operator[](index x) const { return d[checked(x.i, x.line)]; }
  T& operator[](written x) { return d[checked(x.i, x.line)]; }
  T& operator[](addressed x) { return d[checked(x.i, x.line)]; }
  T* operator+(integer i) { return d + i; }
  template <class U>
  explicit operator U*() {
    return (U*)d;
  }
};

}  // namespace msl
