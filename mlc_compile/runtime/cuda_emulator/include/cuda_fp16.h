// half for the emulated device: every operation is rounded once, to nearest even.
#pragma once
#include "cuda_emulator.h"

namespace emu {

using half_bits = unsigned short;

// _Float16 is the host's own; conversions to and from it are exact or rounded once.
static __forceinline__ half_bits to_half(float x) { return bits<half_bits>((_Float16)x); }
static __forceinline__ float from_half(half_bits x) { return (float)bits<_Float16>(x); }

// a * b + c rounded to odd, so that a second rounding to a short type gives what one would
// (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
static inline double fma_to_odd(double a, double b, double c) {
  double p = a * b;  // exact: the factors have 11 bits at most
  double s = p + c;
  double t = s - p;
  double error = (p - (s - t)) + (c - t);
  if (error != 0 && s - s == 0) {
    auto n = bits<long long>(s);
    if ((n & 1) == 0) n += ((error > 0) == (s > 0)) ? 1 : -1;
    s = bits<double>(n);
  }
  return s;
}
static inline half_bits half_fma(half_bits a, half_bits b, half_bits c) {
  return bits<half_bits>((_Float16)fma_to_odd(from_half(a), from_half(b), from_half(c)));
}

}  // namespace emu

struct __half_raw {
  unsigned short x;
};

struct __align__(2) __half {
  unsigned short bits_;
  __half() = default;
  constexpr __half(const __half_raw& r) : bits_(r.x) {}
  __half(float x) : bits_(emu::to_half(x)) {}
  __half(double x) : bits_(emu::bits<unsigned short>((_Float16)x)) {}
  __half(int x) : __half((double)x) {}
  __half(unsigned x) : __half((double)x) {}
  __half(short x) : __half((double)x) {}
  __half(unsigned short x) : __half((double)x) {}
  __half(long x) : __half((double)x) {}
  __half(unsigned long x) : __half((double)x) {}
  __half(long long x) : __half((double)x) {}
  __half(unsigned long long x) : __half((double)x) {}
  operator float() const { return emu::from_half(bits_); }
  operator __half_raw() const { return {bits_}; }
  explicit operator bool() const { return (bits_ & 0x7FFF) != 0; }
  explicit operator double() const { return (double)(float)*this; }
  explicit operator signed char() const { return (signed char)(float)*this; }
  explicit operator unsigned char() const { return (unsigned char)(float)*this; }
  explicit operator char() const { return (char)(float)*this; }
  explicit operator short() const { return (short)(float)*this; }
  explicit operator unsigned short() const { return (unsigned short)(float)*this; }
  explicit operator int() const { return (int)(float)*this; }
  explicit operator unsigned() const { return (unsigned)(float)*this; }
  explicit operator long() const { return (long)(float)*this; }
  explicit operator unsigned long() const { return (unsigned long)(float)*this; }
  explicit operator long long() const { return (long long)(float)*this; }
  explicit operator unsigned long long() const { return (unsigned long long)(float)*this; }
};
using half = __half;
using __nv_half = __half;

struct __half2_raw {
  unsigned short x, y;
};
struct __align__(4) __half2 {
  __half x, y;
  __half2() = default;
  __half2(const __half& a, const __half& b) : x(a), y(b) {}
  __half2(const __half2_raw& r) : x(__half_raw{r.x}), y(__half_raw{r.y}) {}
};
using half2 = __half2;
using __nv_half2 = __half2;

// ---- conversions

static __forceinline__ half __float2half(float x) { return half(x); }
static __forceinline__ half __float2half_rn(float x) { return half(x); }
static inline half __float2half_rz(float x) {
  half h(x);
  if (fabsf((float)h) > fabsf(x)) h.bits_ -= 1;
  return h;
}
static __forceinline__ half __double2half(double x) { return half(x); }
static __forceinline__ float __half2float(half x) { return (float)x; }
static __forceinline__ half2 __floats2half2_rn(float x, float y) { return half2(half(x), half(y)); }
static __forceinline__ half2 __float2half2_rn(float x) { return half2(half(x), half(x)); }
static __forceinline__ half2 __float22half2_rn(float2 v) { return half2(half(v.x), half(v.y)); }
static __forceinline__ float2 __half22float2(half2 v) { return {(float)v.x, (float)v.y}; }
static __forceinline__ half __low2half(half2 v) { return v.x; }
static __forceinline__ half __high2half(half2 v) { return v.y; }
static __forceinline__ float __low2float(half2 v) { return (float)v.x; }
static __forceinline__ float __high2float(half2 v) { return (float)v.y; }
static __forceinline__ half2 __halves2half2(half a, half b) { return half2(a, b); }
static __forceinline__ half2 __half2half2(half a) { return half2(a, a); }
static __forceinline__ half2 make_half2(half a, half b) { return half2(a, b); }
static __forceinline__ half2 __low2half2(half2 v) { return half2(v.x, v.x); }
static __forceinline__ half2 __high2half2(half2 v) { return half2(v.y, v.y); }
static __forceinline__ half2 __lowhigh2highlow(half2 v) { return half2(v.y, v.x); }
static __forceinline__ half2 __lows2half2(half2 a, half2 b) { return half2(a.x, b.x); }
static __forceinline__ half2 __highs2half2(half2 a, half2 b) { return half2(a.y, b.y); }
static __forceinline__ unsigned short __half_as_ushort(half x) { return x.bits_; }
static __forceinline__ short __half_as_short(half x) { return (short)x.bits_; }
static __forceinline__ half __ushort_as_half(unsigned short x) { return __half_raw{x}; }
static __forceinline__ half __short_as_half(short x) { return __half_raw{(unsigned short)x}; }
static inline half __int2half_rn(int x) { return half(x); }
static inline half __uint2half_rn(unsigned x) { return half(x); }
static inline half __short2half_rn(short x) { return half(x); }
static inline half __ushort2half_rn(unsigned short x) { return half(x); }
static inline int __half2int_rn(half x) { return (int)rintf((float)x); }
static inline int __half2int_rz(half x) { return (int)(float)x; }
static inline unsigned __half2uint_rn(half x) { return (unsigned)rintf((float)x); }

// ---- arithmetic
// A float32 sum, product, quotient or root of two halves, rounded again, is rounded correctly:
// 24 bits are at least 2 * 11 + 2 (Figueroa, "When is double rounding innocuous?", 1995).

#define EMU_HALF_2(name, expression)                                                        \
  static __forceinline__ half name(half p, half q) {                                        \
    float a = (float)p, b = (float)q;                                                       \
    return half(expression);                                                                \
  }
EMU_HALF_2(__hadd, a + b)
EMU_HALF_2(__hsub, a - b)
EMU_HALF_2(__hmul, a * b)
EMU_HALF_2(__hdiv, a / b)
EMU_HALF_2(__hadd_rn, a + b)
EMU_HALF_2(__hsub_rn, a - b)
EMU_HALF_2(__hmul_rn, a * b)
EMU_HALF_2(__hmax, fmaxf(a, b))
EMU_HALF_2(__hmin, fminf(a, b))
#undef EMU_HALF_2
static __forceinline__ half __hfma(half a, half b, half c) {
  return __half_raw{emu::half_fma(a.bits_, b.bits_, c.bits_)};
}
static __forceinline__ half __hneg(half a) { return __half_raw{(unsigned short)(a.bits_ ^ 0x8000)}; }
static __forceinline__ half __habs(half a) { return __half_raw{(unsigned short)(a.bits_ & 0x7FFF)}; }
static __forceinline__ bool __hisnan(half a) { return (a.bits_ & 0x7FFF) > 0x7C00; }
static __forceinline__ int __hisinf(half a) {
  return (a.bits_ & 0x7FFF) == 0x7C00 ? (a.bits_ & 0x8000 ? -1 : 1) : 0;
}
#define EMU_HALF_COMPARE(name, op) \
  static __forceinline__ bool name(half a, half b) { return (float)a op(float) b; }
EMU_HALF_COMPARE(__heq, ==)
EMU_HALF_COMPARE(__hne, !=)
EMU_HALF_COMPARE(__hgt, >)
EMU_HALF_COMPARE(__hge, >=)
EMU_HALF_COMPARE(__hlt, <)
EMU_HALF_COMPARE(__hle, <=)
EMU_HALF_COMPARE(operator==, ==)
EMU_HALF_COMPARE(operator!=, !=)
EMU_HALF_COMPARE(operator>, >)
EMU_HALF_COMPARE(operator>=, >=)
EMU_HALF_COMPARE(operator<, <)
EMU_HALF_COMPARE(operator<=, <=)
#undef EMU_HALF_COMPARE
#define EMU_HALF_1(name, expression)                                                        \
  static inline half name(half p) {                                                         \
    float a = (float)p;                                                                     \
    return half(expression);                                                                \
  }
EMU_HALF_1(hexp, expf(a))
EMU_HALF_1(hexp2, exp2f(a))
EMU_HALF_1(hexp10, exp10f(a))
EMU_HALF_1(hlog, logf(a))
EMU_HALF_1(hlog2, log2f(a))
EMU_HALF_1(hlog10, log10f(a))
EMU_HALF_1(hsqrt, sqrtf(a))
EMU_HALF_1(hrsqrt, 1.0f / sqrtf(a))
EMU_HALF_1(hrcp, 1.0f / a)
EMU_HALF_1(hsin, sinf(a))
EMU_HALF_1(hcos, cosf(a))
EMU_HALF_1(hfloor, floorf(a))
EMU_HALF_1(hceil, ceilf(a))
EMU_HALF_1(htrunc, truncf(a))
EMU_HALF_1(hrint, rintf(a))
EMU_HALF_1(htanh, tanhf(a))
#undef EMU_HALF_1
static __forceinline__ half operator+(half a, half b) { return __hadd(a, b); }
static __forceinline__ half operator-(half a, half b) { return __hsub(a, b); }
static __forceinline__ half operator*(half a, half b) { return __hmul(a, b); }
static __forceinline__ half operator/(half a, half b) { return __hdiv(a, b); }
static __forceinline__ half operator-(half a) { return __hneg(a); }
static __forceinline__ half operator+(half a) { return a; }
static __forceinline__ half& operator+=(half& a, half b) { return a = a + b; }
static __forceinline__ half& operator-=(half& a, half b) { return a = a - b; }
static __forceinline__ half& operator*=(half& a, half b) { return a = a * b; }
static __forceinline__ half& operator/=(half& a, half b) { return a = a / b; }

#define EMU_HALF2_2(name, one) \
  static __forceinline__ half2 name(half2 a, half2 b) { return half2(one(a.x, b.x), one(a.y, b.y)); }
EMU_HALF2_2(__hadd2, __hadd)
EMU_HALF2_2(__hsub2, __hsub)
EMU_HALF2_2(__hmul2, __hmul)
EMU_HALF2_2(__hadd2_rn, __hadd)
EMU_HALF2_2(__hsub2_rn, __hsub)
EMU_HALF2_2(__hmul2_rn, __hmul)
EMU_HALF2_2(__h2div, __hdiv)
EMU_HALF2_2(__hmax2, __hmax)
EMU_HALF2_2(__hmin2, __hmin)
EMU_HALF2_2(operator+, __hadd)
EMU_HALF2_2(operator-, __hsub)
EMU_HALF2_2(operator*, __hmul)
EMU_HALF2_2(operator/, __hdiv)
#undef EMU_HALF2_2
#define EMU_HALF2_1(name, one) \
  static inline half2 name(half2 a) { return half2(one(a.x), one(a.y)); }
EMU_HALF2_1(__hneg2, __hneg)
EMU_HALF2_1(__habs2, __habs)
EMU_HALF2_1(h2exp, hexp)
EMU_HALF2_1(h2exp2, hexp2)
EMU_HALF2_1(h2log, hlog)
EMU_HALF2_1(h2log2, hlog2)
EMU_HALF2_1(h2sqrt, hsqrt)
EMU_HALF2_1(h2rsqrt, hrsqrt)
EMU_HALF2_1(h2rcp, hrcp)
EMU_HALF2_1(h2tanh, htanh)
EMU_HALF2_1(operator-, __hneg)
#undef EMU_HALF2_1
static __forceinline__ half2 __hfma2(half2 a, half2 b, half2 c) {
  return half2(__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y));
}
static __forceinline__ half2& operator+=(half2& a, half2 b) { return a = a + b; }
static __forceinline__ half2& operator-=(half2& a, half2 b) { return a = a - b; }
static __forceinline__ half2& operator*=(half2& a, half2 b) { return a = a * b; }
static __forceinline__ half2& operator/=(half2& a, half2 b) { return a = a / b; }
