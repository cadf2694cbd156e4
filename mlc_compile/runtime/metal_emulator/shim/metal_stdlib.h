// The part of MSL's standard library that TVM's Metal code uses, in C++20 without the C library.
// MSL: Metal Shading Language Specification. Written from its descriptions.
#pragma once
#include "msl_core.h"

typedef _Float16 half;
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef __SIZE_TYPE__ size_t;
inline constexpr half operator""h(long double v) { return (half)v; }

namespace msl {
template <class T>
constexpr bool arithmetic = same<T, half> || same<T, float> || same<T, bool> || same<T, char> ||
                            same<T, signed char> || same<T, uchar> || same<T, short> ||
                            same<T, ushort> || same<T, int> || same<T, uint> || same<T, long> ||
                            same<T, ulong> || same<T, long long> || same<T, unsigned long long>;
}  // namespace msl

// Storage and arithmetic of bfloat; the limits check says where it may be used.
struct bfloat {
  unsigned short bits;
  bfloat() = default;
  template <class T>
    requires(msl::arithmetic<T>)
  bfloat(T v) {
    float f = (float)v;
    unsigned u;
    __builtin_memcpy(&u, &f, 4);
    u += f != f ? 0 : 0x7fffu + (u >> 16 & 1);
    bits = (unsigned short)(u >> 16);
  }
  operator float() const {
    unsigned u = (unsigned)bits << 16;
    float f;
    __builtin_memcpy(&f, &u, 4);
    return f;
  }
};

namespace metal {

template <class T>
struct as_plain {
  using type = T;
};
template <class T>
using as_plain_t = typename as_plain<T>::type;

template <class T>
concept real = msl::same<T, float> || msl::same<T, half> || msl::same<T, bfloat>;
template <class T>
concept scalar = msl::arithmetic<T> || msl::same<T, bfloat>;

template <class T, int N>
struct lanes {
  T d[N];
};
template <class T>
struct lanes<T, 2> {
  union {
    T d[2];
    struct {
      T x, y;
    };
  };
};
template <class T>
struct lanes<T, 3> {
  union {
    T d[4];
    struct {
      T x, y, z;
    };
  };
};
template <class T>
struct lanes<T, 4> {
  union {
    T d[4];
    struct {
      T x, y, z, w;
    };
  };
};

template <class T, int N>
struct alignas(sizeof(T) * (N == 3 ? 4 : N)) vec : lanes<T, N> {
  using lanes<T, N>::d;
  vec() {}
  template <scalar U>
  vec(U s) {
    for (int i = 0; i < N; i++) d[i] = (T)s;
  }
  template <class U>
  explicit vec(const vec<U, N>& o) {
    for (int i = 0; i < N; i++) d[i] = (T)o.d[i];
  }
  vec(T a, T b) requires(N == 2) { d[0] = a, d[1] = b; }
  vec(T a, T b, T c) requires(N == 3) { d[0] = a, d[1] = b, d[2] = c; }
  vec(T a, T b, T c, T e) requires(N == 4) { d[0] = a, d[1] = b, d[2] = c, d[3] = e; }
  T& operator[](msl::index x) { return d[checked(x)]; }
  const T& operator[](msl::index x) const { return d[checked(x)]; }
  T& operator[](msl::written x) { return d[checked({x.i, x.line})]; }
  static int checked(msl::index x) {
#if MSL_MODE >= 1
    if (__builtin_expect((msl::size)x.i >= (msl::size)N, 0))
      msl_bad_local("a vector", x.i, N, x.line);
#endif
    return (int)x.i;
  }
};

#define MSL_OPERATOR(op)                                                        \
  template <class T, int N>                                                     \
  inline vec<T, N> operator op(const vec<T, N>& a, const vec<T, N>& b) {        \
    vec<T, N> r;                                                                \
    for (int i = 0; i < N; i++) r.d[i] = (T)(a.d[i] op b.d[i]);                 \
    return r;                                                                   \
  }                                                                             \
  template <class T, int N>                                                     \
  inline vec<T, N> operator op(const vec<T, N>& a, as_plain_t<T> b) {           \
    return a op vec<T, N>(b);                                                   \
  }                                                                             \
  template <class T, int N>                                                     \
  inline vec<T, N> operator op(as_plain_t<T> a, const vec<T, N>& b) {           \
    return vec<T, N>(a) op b;                                                   \
  }                                                                             \
  template <class T, int N, class U>                                            \
  inline vec<T, N>& operator op##=(vec<T, N>& a, const U& b) {                  \
    return a = a op b;                                                          \
  }
MSL_OPERATOR(+) MSL_OPERATOR(-) MSL_OPERATOR(*) MSL_OPERATOR(/) MSL_OPERATOR(%)
MSL_OPERATOR(&) MSL_OPERATOR(|) MSL_OPERATOR(^) MSL_OPERATOR(<<) MSL_OPERATOR(>>)
#undef MSL_OPERATOR
#define MSL_COMPARE(op)                                                         \
  template <class T, int N>                                                     \
  inline vec<bool, N> operator op(const vec<T, N>& a, const vec<T, N>& b) {     \
    vec<bool, N> r;                                                             \
    for (int i = 0; i < N; i++) r.d[i] = a.d[i] op b.d[i];                      \
    return r;                                                                   \
  }
MSL_COMPARE(<) MSL_COMPARE(<=) MSL_COMPARE(>) MSL_COMPARE(>=) MSL_COMPARE(==) MSL_COMPARE(!=)
MSL_COMPARE(&&) MSL_COMPARE(||)
#undef MSL_COMPARE
template <class T, int N>
inline vec<T, N> operator-(const vec<T, N>& a) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r.d[i] = (T)-a.d[i];
  return r;
}
template <int N>
inline vec<bool, N> operator!(const vec<bool, N>& a) {
  vec<bool, N> r;
  for (int i = 0; i < N; i++) r.d[i] = !a.d[i];
  return r;
}
template <class T, int N>
inline vec<T, N> operator~(const vec<T, N>& a) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r.d[i] = (T)~a.d[i];
  return r;
}

// Real functions of one, two and three arguments, computed in float. An argument of another type,
// or two of different types, is ambiguous in MSL and has no overload here.
#define MSL_REAL1(name, value)                                                  \
  template <real T>                                                             \
  inline T name(T x_) {                                                         \
    float x = (float)x_;                                                        \
    return (T)(value);                                                          \
  }                                                                             \
  template <real T, int N>                                                      \
  inline vec<T, N> name(const vec<T, N>& v) {                                   \
    vec<T, N> r;                                                                \
    for (int i = 0; i < N; i++) r.d[i] = name(v.d[i]);                          \
    return r;                                                                   \
  }
#define MSL_REAL2(name, value)                                                  \
  template <real T>                                                             \
  inline T name(T x_, T y_) {                                                   \
    float x = (float)x_, y = (float)y_;                                         \
    return (T)(value);                                                          \
  }                                                                             \
  template <real T, int N>                                                      \
  inline vec<T, N> name(const vec<T, N>& a, const vec<T, N>& b) {               \
    vec<T, N> r;                                                                \
    for (int i = 0; i < N; i++) r.d[i] = name(a.d[i], b.d[i]);                  \
    return r;                                                                   \
  }
MSL_REAL1(exp, __builtin_expf(x)) MSL_REAL1(exp2, __builtin_exp2f(x))
MSL_REAL1(exp10, __builtin_powf(10.0f, x)) MSL_REAL1(log, __builtin_logf(x))
MSL_REAL1(log2, __builtin_log2f(x)) MSL_REAL1(log10, __builtin_log10f(x))
MSL_REAL1(sin, __builtin_sinf(x)) MSL_REAL1(cos, __builtin_cosf(x)) MSL_REAL1(tan, __builtin_tanf(x))
MSL_REAL1(asin, __builtin_asinf(x)) MSL_REAL1(acos, __builtin_acosf(x))
MSL_REAL1(atan, __builtin_atanf(x)) MSL_REAL1(sinh, __builtin_sinhf(x))
MSL_REAL1(cosh, __builtin_coshf(x)) MSL_REAL1(tanh, __builtin_tanhf(x))
MSL_REAL1(sqrt, __builtin_sqrtf(x)) MSL_REAL1(rsqrt, 1.0f / __builtin_sqrtf(x))
MSL_REAL1(floor, __builtin_floorf(x)) MSL_REAL1(ceil, __builtin_ceilf(x))
MSL_REAL1(trunc, __builtin_truncf(x)) MSL_REAL1(rint, __builtin_rintf(x))
MSL_REAL1(round, __builtin_roundf(x)) MSL_REAL1(fabs, __builtin_fabsf(x))
MSL_REAL1(fract, x - __builtin_floorf(x)) MSL_REAL1(sign, (float)((x > 0) - (x < 0)))
MSL_REAL2(pow, __builtin_powf(x, y)) MSL_REAL2(fmod, __builtin_fmodf(x, y))
MSL_REAL2(powr, __builtin_powf(x, y)) MSL_REAL2(atan2, __builtin_atan2f(x, y))
MSL_REAL2(fmax, __builtin_fmaxf(x, y)) MSL_REAL2(fmin, __builtin_fminf(x, y))
MSL_REAL2(copysign, __builtin_copysignf(x, y))
#undef MSL_REAL1
#undef MSL_REAL2
template <real T>
inline T fma(T a, T b, T c) {
  return (T)__builtin_fmaf((float)a, (float)b, (float)c);
}
template <real T, int N>
inline vec<T, N> fma(const vec<T, N>& a, const vec<T, N>& b, const vec<T, N>& c) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r.d[i] = fma(a.d[i], b.d[i], c.d[i]);
  return r;
}
template <real T>
inline bool isnan(T x) {
  return __builtin_isnan((float)x);
}
template <real T>
inline bool isinf(T x) {
  return __builtin_isinf((float)x);
}

template <scalar T>
inline T max(T a, T b) {
  return a > b ? a : b;
}
template <scalar T>
inline T min(T a, T b) {
  return a < b ? a : b;
}
template <class T, int N>
inline vec<T, N> max(const vec<T, N>& a, const vec<T, N>& b) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r.d[i] = max(a.d[i], b.d[i]);
  return r;
}
template <class T, int N>
inline vec<T, N> min(const vec<T, N>& a, const vec<T, N>& b) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r.d[i] = min(a.d[i], b.d[i]);
  return r;
}
template <scalar T>
inline T clamp(T x, T low, T high) {
  return min(max(x, low), high);
}
template <scalar T>
inline T abs(T x) {
  return x < (T)0 ? (T)-x : x;
}
template <scalar T>
inline T select(T no, T yes, bool c) {
  return c ? yes : no;
}
template <class T, int N>
inline vec<T, N> select(const vec<T, N>& no, const vec<T, N>& yes, const vec<bool, N>& c) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r.d[i] = c.d[i] ? yes.d[i] : no.d[i];
  return r;
}
template <class T, int N>
inline T dot(const vec<T, N>& a, const vec<T, N>& b) {
  float r = 0;
  for (int i = 0; i < N; i++) r += (float)a.d[i] * (float)b.d[i];
  return (T)r;
}
template <int N>
inline bool all(const vec<bool, N>& a) {
  for (int i = 0; i < N; i++)
    if (!a.d[i]) return false;
  return true;
}
template <int N>
inline bool any(const vec<bool, N>& a) {
  return !all(!a);
}
inline uint popcount(uint x) { return (uint)__builtin_popcount(x); }
inline int popcount(int x) { return __builtin_popcount((uint)x); }
inline uint clz(uint x) { return x ? (uint)__builtin_clz(x) : 32; }
inline int clz(int x) { return x ? __builtin_clz((uint)x) : 32; }
inline uint ctz(uint x) { return x ? (uint)__builtin_ctz(x) : 32; }
inline int ctz(int x) { return x ? __builtin_ctz((uint)x) : 32; }

template <class To, class From>
inline To as_type(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "as_type between types of different sizes");
  To to;
  __builtin_memcpy((void*)&to, (const void*)&from, sizeof(To));
  return to;
}

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return (mem_flags)((int)a | (int)b); }
inline void threadgroup_barrier(mem_flags f, unsigned line = __builtin_LINE()) {
  msl_barrier((int)f, line);
}
inline void simdgroup_barrier(mem_flags f, unsigned line = __builtin_LINE()) {
  msl_simd_wait((int)f | 8, line);
}

// Functions of a SIMD group: post, wait, read, wait until all have read.
template <class T>
inline T msl_exchange(T v, int from, bool keep, unsigned line) {
  static_assert(sizeof(T) <= 16);
  __builtin_memcpy(msl_slot(msl_lane()), (const void*)&v, sizeof(T));
  msl_simd_wait(0, line);
  T r = v;
  if (!keep) {
#if MSL_MODE >= 1
    if (from < 0 || from >= (int)msl::kLanes)
      msl_fault("a shuffle reads a lane outside of the SIMD group, lane", from, line);
    if (!msl_lane_active((unsigned)from))
      msl_fault("a shuffle reads a lane that does not take part, lane", from, line);
#endif
    __builtin_memcpy((void*)&r, msl_slot((unsigned)from & 31), sizeof(T));
  }
  msl_simd_wait(16, line);
  return r;
}
template <class T>
inline T simd_shuffle(T v, ushort lane, unsigned line = __builtin_LINE()) {
  return msl_exchange(v, lane, false, line);
}
template <class T>
inline T simd_broadcast(T v, ushort lane, unsigned line = __builtin_LINE()) {
  return msl_exchange(v, lane, false, line);
}
template <class T>
inline T simd_shuffle_xor(T v, ushort mask, unsigned line = __builtin_LINE()) {
  return msl_exchange(v, (int)(msl_lane() ^ mask), false, line);
}
// Lanes past the end of the SIMD group keep their own value.
template <class T>
inline T simd_shuffle_down(T v, ushort delta, unsigned line = __builtin_LINE()) {
  int from = (int)(msl_lane() + delta);
  return msl_exchange(v, from, from >= (int)msl::kLanes, line);
}
template <class T>
inline T simd_shuffle_up(T v, ushort delta, unsigned line = __builtin_LINE()) {
  int from = (int)msl_lane() - (int)delta;
  return msl_exchange(v, from, from < 0, line);
}
template <class T, class Combine>
inline T msl_reduce(T v, Combine combine, unsigned line) {
  static_assert(sizeof(T) <= 16);
  __builtin_memcpy(msl_slot(msl_lane()), (const void*)&v, sizeof(T));
  msl_simd_wait(0, line);
  T r = v;
  bool first = true;
  for (unsigned i = 0; i < msl::kLanes; i++) {
    if (!msl_lane_active(i)) continue;
    T x;
    __builtin_memcpy((void*)&x, msl_slot(i), sizeof(T));
    r = first ? x : combine(r, x);
    first = false;
  }
  msl_simd_wait(16, line);
  return r;
}
template <class T>
inline T simd_sum(T v, unsigned line = __builtin_LINE()) {
  return msl_reduce(v, [](T a, T b) { return (T)(a + b); }, line);
}
template <class T>
inline T simd_product(T v, unsigned line = __builtin_LINE()) {
  return msl_reduce(v, [](T a, T b) { return (T)(a * b); }, line);
}
template <class T>
inline T simd_max(T v, unsigned line = __builtin_LINE()) {
  return msl_reduce(v, [](T a, T b) { return max(a, b); }, line);
}
template <class T>
inline T simd_min(T v, unsigned line = __builtin_LINE()) {
  return msl_reduce(v, [](T a, T b) { return min(a, b); }, line);
}
inline bool simd_all(bool v, unsigned line = __builtin_LINE()) {
  return msl_reduce(v, [](bool a, bool b) { return a && b; }, line);
}
inline bool simd_any(bool v, unsigned line = __builtin_LINE()) {
  return msl_reduce(v, [](bool a, bool b) { return a || b; }, line);
}

// SIMD-group matrices: every lane holds the whole tile, so that only loads and stores meet.
template <class T, int Columns, int Rows = Columns>
struct simdgroup_matrix {
  static_assert(Columns == 8 && Rows == 8, "only 8x8");
  T m[Rows][Columns];
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T diagonal) {
    for (int i = 0; i < Rows; i++)
      for (int j = 0; j < Columns; j++) m[i][j] = i == j ? diagonal : (T)0;
  }
};
typedef simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
typedef simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
template <class T, int C, int R>
inline simdgroup_matrix<T, C, R> make_filled_simdgroup_matrix(T v) {
  simdgroup_matrix<T, C, R> r;
  for (auto& row : r.m)
    for (auto& x : row) x = v;
  return r;
}
template <class T, int C, int R, class U, class Space>
inline void simdgroup_load(simdgroup_matrix<T, C, R>& to, const msl::pointer<U, Space>& from,
                           ulong stride = C, ulong = 0, bool transpose = false,
                           unsigned line = __builtin_LINE()) {
  static_assert(msl::same<typename msl::plain<U>::type, T>, "a matrix of another element type");
  msl_simd_wait(32, line);
  for (int i = 0; i < R; i++)
    for (int j = 0; j < C; j++)
      to.m[i][j] = from.get((msl::integer)(transpose ? j * stride + i : i * stride + j), line);
  msl_simd_wait(16, line);
}
template <class T, int C, int R, class Space>
inline void simdgroup_store(const simdgroup_matrix<T, C, R>& from, const msl::pointer<T, Space>& to,
                            ulong stride = C, ulong = 0, bool transpose = false,
                            unsigned line = __builtin_LINE()) {
  msl_simd_wait(32, line);
  if (msl_lane() == 0)
    for (int i = 0; i < R; i++)
      for (int j = 0; j < C; j++)
        to.put((msl::integer)(transpose ? j * stride + i : i * stride + j), line) = from.m[i][j];
  msl_simd_wait(16, line);
}
template <class D, class A, class B, class C>
inline void simdgroup_multiply_accumulate(D& d, const A& a, const B& b, const C& c) {
  float r[8][8];
  for (int i = 0; i < 8; i++)
    for (int j = 0; j < 8; j++) r[i][j] = (float)c.m[i][j];
  for (int i = 0; i < 8; i++)
    for (int k = 0; k < 8; k++) {
      float x = (float)a.m[i][k];
      for (int j = 0; j < 8; j++) r[i][j] += x * (float)b.m[k][j];
    }
  for (int i = 0; i < 8; i++)
    for (int j = 0; j < 8; j++) d.m[i][j] = (decltype(+d.m[i][j]))r[i][j];
}
template <class D, class A, class B>
inline void simdgroup_multiply(D& d, const A& a, const B& b) {
  simdgroup_multiply_accumulate(d, a, b, D((decltype(+d.m[0][0]))0));
}

}  // namespace metal

#define MSL_VECTORS(T)           \
  typedef metal::vec<T, 2> T##2; \
  typedef metal::vec<T, 3> T##3; \
  typedef metal::vec<T, 4> T##4;
MSL_VECTORS(half) MSL_VECTORS(bfloat) MSL_VECTORS(float) MSL_VECTORS(int) MSL_VECTORS(uint)
MSL_VECTORS(short) MSL_VECTORS(ushort) MSL_VECTORS(char) MSL_VECTORS(uchar) MSL_VECTORS(long)
MSL_VECTORS(ulong) MSL_VECTORS(bool)
#undef MSL_VECTORS
