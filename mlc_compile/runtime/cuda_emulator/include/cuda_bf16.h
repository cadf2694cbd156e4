// bfloat16 for the emulated device: every operation is rounded once, to nearest even.
#pragma once
#include "cuda_fp16.h"

namespace emu {

static __forceinline__ unsigned short to_bfloat(float x) {
  unsigned n = bits<unsigned>(x);
  if ((n & 0x7FFFFFFF) > 0x7F800000) return 0x7FFF;
  return (unsigned short)((n + 0x7FFF + (n >> 16 & 1)) >> 16);
}
static __forceinline__ float from_bfloat(unsigned short x) {
  return bits<float>((unsigned)x << 16);
}
// To float rounded to odd, and from there to nearest.
static inline unsigned short to_bfloat(double x) {
  float f = (float)x;
  if ((double)f != x && f - f == 0) {
    unsigned n = bits<unsigned>(f);
    if ((n & 1) == 0) n += (__builtin_fabs(x) > __builtin_fabs((double)f)) ? 1 : -1;
    f = bits<float>(n);
  }
  return to_bfloat(f);
}

}  // namespace emu

struct __nv_bfloat16_raw {
  unsigned short x;
};

struct __align__(2) __nv_bfloat16 {
  unsigned short bits_;
  __nv_bfloat16() = default;
  constexpr __nv_bfloat16(const __nv_bfloat16_raw& r) : bits_(r.x) {}
  __nv_bfloat16(float x) : bits_(emu::to_bfloat(x)) {}
  __nv_bfloat16(double x) : bits_(emu::to_bfloat(x)) {}
  __nv_bfloat16(int x) : __nv_bfloat16((double)x) {}
  __nv_bfloat16(unsigned x) : __nv_bfloat16((double)x) {}
  __nv_bfloat16(short x) : __nv_bfloat16((double)x) {}
  __nv_bfloat16(unsigned short x) : __nv_bfloat16((double)x) {}
  __nv_bfloat16(long x) : __nv_bfloat16((double)x) {}
  __nv_bfloat16(unsigned long x) : __nv_bfloat16((double)x) {}
  __nv_bfloat16(long long x) : __nv_bfloat16((double)x) {}
  __nv_bfloat16(unsigned long long x) : __nv_bfloat16((double)x) {}
  operator float() const { return emu::from_bfloat(bits_); }
  operator __nv_bfloat16_raw() const { return {bits_}; }
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
using nv_bfloat16 = __nv_bfloat16;

struct __nv_bfloat162_raw {
  unsigned short x, y;
};
struct __align__(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
  __nv_bfloat162() = default;
  __nv_bfloat162(const __nv_bfloat16& a, const __nv_bfloat16& b) : x(a), y(b) {}
  __nv_bfloat162(const __nv_bfloat162_raw& r) : x(__nv_bfloat16_raw{r.x}), y(__nv_bfloat16_raw{r.y}) {}
};
using nv_bfloat162 = __nv_bfloat162;

// ---- conversions

static __forceinline__ nv_bfloat16 __float2bfloat16(float x) { return nv_bfloat16(x); }
static __forceinline__ nv_bfloat16 __float2bfloat16_rn(float x) { return nv_bfloat16(x); }
static inline nv_bfloat16 __float2bfloat16_rz(float x) {
  nv_bfloat16 h(x);
  if (fabsf((float)h) > fabsf(x)) h.bits_ -= 1;
  return h;
}
static __forceinline__ nv_bfloat16 __double2bfloat16(double x) { return nv_bfloat16(x); }
static __forceinline__ float __bfloat162float(nv_bfloat16 x) { return (float)x; }
static __forceinline__ nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return nv_bfloat162(nv_bfloat16(x), nv_bfloat16(y)); }
static __forceinline__ nv_bfloat162 __float2bfloat162_rn(float x) { return nv_bfloat162(nv_bfloat16(x), nv_bfloat16(x)); }
static __forceinline__ nv_bfloat162 __float22bfloat162_rn(float2 v) { return nv_bfloat162(nv_bfloat16(v.x), nv_bfloat16(v.y)); }
static __forceinline__ float2 __bfloat1622float2(nv_bfloat162 v) { return {(float)v.x, (float)v.y}; }
static __forceinline__ nv_bfloat16 __low2bfloat16(nv_bfloat162 v) { return v.x; }
static __forceinline__ nv_bfloat16 __high2bfloat16(nv_bfloat162 v) { return v.y; }
static __forceinline__ float __low2float(nv_bfloat162 v) { return (float)v.x; }
static __forceinline__ float __high2float(nv_bfloat162 v) { return (float)v.y; }
static __forceinline__ nv_bfloat162 __halves2bfloat162(nv_bfloat16 a, nv_bfloat16 b) { return nv_bfloat162(a, b); }
static __forceinline__ nv_bfloat162 __bfloat162bfloat162(nv_bfloat16 a) { return nv_bfloat162(a, a); }
static __forceinline__ nv_bfloat162 make_bfloat162(nv_bfloat16 a, nv_bfloat16 b) { return nv_bfloat162(a, b); }
static __forceinline__ nv_bfloat162 __low2bfloat162(nv_bfloat162 v) { return nv_bfloat162(v.x, v.x); }
static __forceinline__ nv_bfloat162 __high2bfloat162(nv_bfloat162 v) { return nv_bfloat162(v.y, v.y); }
static __forceinline__ nv_bfloat162 __lowhigh2highlow(nv_bfloat162 v) { return nv_bfloat162(v.y, v.x); }
static __forceinline__ nv_bfloat162 __lows2bfloat162(nv_bfloat162 a, nv_bfloat162 b) { return nv_bfloat162(a.x, b.x); }
static __forceinline__ nv_bfloat162 __highs2bfloat162(nv_bfloat162 a, nv_bfloat162 b) { return nv_bfloat162(a.y, b.y); }
static __forceinline__ unsigned short __bfloat16_as_ushort(nv_bfloat16 x) { return x.bits_; }
static __forceinline__ short __bfloat16_as_short(nv_bfloat16 x) { return (short)x.bits_; }
static __forceinline__ nv_bfloat16 __ushort_as_bfloat16(unsigned short x) { return __nv_bfloat16_raw{x}; }
static __forceinline__ nv_bfloat16 __short_as_bfloat16(short x) { return __nv_bfloat16_raw{(unsigned short)x}; }
static inline nv_bfloat16 __int2bfloat16_rn(int x) { return nv_bfloat16(x); }
static inline nv_bfloat16 __uint2bfloat16_rn(unsigned x) { return nv_bfloat16(x); }
static inline nv_bfloat16 __short2bfloat16_rn(short x) { return nv_bfloat16(x); }
static inline nv_bfloat16 __ushort2bfloat16_rn(unsigned short x) { return nv_bfloat16(x); }
static inline int __bfloat162int_rn(nv_bfloat16 x) { return (int)rintf((float)x); }
static inline int __bfloat162int_rz(nv_bfloat16 x) { return (int)(float)x; }
static inline unsigned __bfloat162uint_rn(nv_bfloat16 x) { return (unsigned)rintf((float)x); }

// ---- arithmetic
// As for half, a float32 result of two bfloat16s is rounded correctly when it is rounded again.

#define EMU_BFLOAT_2(name, expression)                                                        \
  static __forceinline__ nv_bfloat16 name(nv_bfloat16 p, nv_bfloat16 q) {                                        \
    float a = (float)p, b = (float)q;                                                       \
    return nv_bfloat16(expression);                                                                \
  }
EMU_BFLOAT_2(__hadd, a + b)
EMU_BFLOAT_2(__hsub, a - b)
EMU_BFLOAT_2(__hmul, a * b)
EMU_BFLOAT_2(__hdiv, a / b)
EMU_BFLOAT_2(__hadd_rn, a + b)
EMU_BFLOAT_2(__hsub_rn, a - b)
EMU_BFLOAT_2(__hmul_rn, a * b)
EMU_BFLOAT_2(__hmax, fmaxf(a, b))
EMU_BFLOAT_2(__hmin, fminf(a, b))
#undef EMU_BFLOAT_2
static __forceinline__ nv_bfloat16 __hfma(nv_bfloat16 a, nv_bfloat16 b, nv_bfloat16 c) {
  return __nv_bfloat16_raw{emu::to_bfloat(emu::fma_to_odd((float)a, (float)b, (float)c))};
}
static __forceinline__ nv_bfloat16 __hneg(nv_bfloat16 a) { return __nv_bfloat16_raw{(unsigned short)(a.bits_ ^ 0x8000)}; }
static __forceinline__ nv_bfloat16 __habs(nv_bfloat16 a) { return __nv_bfloat16_raw{(unsigned short)(a.bits_ & 0x7FFF)}; }
static __forceinline__ bool __hisnan(nv_bfloat16 a) { return (a.bits_ & 0x7FFF) > 0x7F80; }
static __forceinline__ int __hisinf(nv_bfloat16 a) {
  return (a.bits_ & 0x7FFF) == 0x7F80 ? (a.bits_ & 0x8000 ? -1 : 1) : 0;
}
#define EMU_BFLOAT_COMPARE(name, op) \
  static __forceinline__ bool name(nv_bfloat16 a, nv_bfloat16 b) { return (float)a op(float) b; }
EMU_BFLOAT_COMPARE(__heq, ==)
EMU_BFLOAT_COMPARE(__hne, !=)
EMU_BFLOAT_COMPARE(__hgt, >)
EMU_BFLOAT_COMPARE(__hge, >=)
EMU_BFLOAT_COMPARE(__hlt, <)
EMU_BFLOAT_COMPARE(__hle, <=)
EMU_BFLOAT_COMPARE(operator==, ==)
EMU_BFLOAT_COMPARE(operator!=, !=)
EMU_BFLOAT_COMPARE(operator>, >)
EMU_BFLOAT_COMPARE(operator>=, >=)
EMU_BFLOAT_COMPARE(operator<, <)
EMU_BFLOAT_COMPARE(operator<=, <=)
#undef EMU_BFLOAT_COMPARE
#define EMU_BFLOAT_1(name, expression)                                                        \
  static inline nv_bfloat16 name(nv_bfloat16 p) {                                                         \
    float a = (float)p;                                                                     \
    return nv_bfloat16(expression);                                                                \
  }
EMU_BFLOAT_1(hexp, expf(a))
EMU_BFLOAT_1(hexp2, exp2f(a))
EMU_BFLOAT_1(hexp10, exp10f(a))
EMU_BFLOAT_1(hlog, logf(a))
EMU_BFLOAT_1(hlog2, log2f(a))
EMU_BFLOAT_1(hlog10, log10f(a))
EMU_BFLOAT_1(hsqrt, sqrtf(a))
EMU_BFLOAT_1(hrsqrt, 1.0f / sqrtf(a))
EMU_BFLOAT_1(hrcp, 1.0f / a)
EMU_BFLOAT_1(hsin, sinf(a))
EMU_BFLOAT_1(hcos, cosf(a))
EMU_BFLOAT_1(hfloor, floorf(a))
EMU_BFLOAT_1(hceil, ceilf(a))
EMU_BFLOAT_1(htrunc, truncf(a))
EMU_BFLOAT_1(hrint, rintf(a))
EMU_BFLOAT_1(htanh, tanhf(a))
#undef EMU_BFLOAT_1
static __forceinline__ nv_bfloat16 operator+(nv_bfloat16 a, nv_bfloat16 b) { return __hadd(a, b); }
static __forceinline__ nv_bfloat16 operator-(nv_bfloat16 a, nv_bfloat16 b) { return __hsub(a, b); }
static __forceinline__ nv_bfloat16 operator*(nv_bfloat16 a, nv_bfloat16 b) { return __hmul(a, b); }
static __forceinline__ nv_bfloat16 operator/(nv_bfloat16 a, nv_bfloat16 b) { return __hdiv(a, b); }
static __forceinline__ nv_bfloat16 operator-(nv_bfloat16 a) { return __hneg(a); }
static __forceinline__ nv_bfloat16 operator+(nv_bfloat16 a) { return a; }
static __forceinline__ nv_bfloat16& operator+=(nv_bfloat16& a, nv_bfloat16 b) { return a = a + b; }
static __forceinline__ nv_bfloat16& operator-=(nv_bfloat16& a, nv_bfloat16 b) { return a = a - b; }
static __forceinline__ nv_bfloat16& operator*=(nv_bfloat16& a, nv_bfloat16 b) { return a = a * b; }
static __forceinline__ nv_bfloat16& operator/=(nv_bfloat16& a, nv_bfloat16 b) { return a = a / b; }

#define EMU_BFLOAT2_2(name, one) \
  static __forceinline__ nv_bfloat162 name(nv_bfloat162 a, nv_bfloat162 b) { return nv_bfloat162(one(a.x, b.x), one(a.y, b.y)); }
EMU_BFLOAT2_2(__hadd2, __hadd)
EMU_BFLOAT2_2(__hsub2, __hsub)
EMU_BFLOAT2_2(__hmul2, __hmul)
EMU_BFLOAT2_2(__hadd2_rn, __hadd)
EMU_BFLOAT2_2(__hsub2_rn, __hsub)
EMU_BFLOAT2_2(__hmul2_rn, __hmul)
EMU_BFLOAT2_2(__h2div, __hdiv)
EMU_BFLOAT2_2(__hmax2, __hmax)
EMU_BFLOAT2_2(__hmin2, __hmin)
EMU_BFLOAT2_2(operator+, __hadd)
EMU_BFLOAT2_2(operator-, __hsub)
EMU_BFLOAT2_2(operator*, __hmul)
EMU_BFLOAT2_2(operator/, __hdiv)
#undef EMU_BFLOAT2_2
#define EMU_BFLOAT2_1(name, one) \
  static inline nv_bfloat162 name(nv_bfloat162 a) { return nv_bfloat162(one(a.x), one(a.y)); }
EMU_BFLOAT2_1(__hneg2, __hneg)
EMU_BFLOAT2_1(__habs2, __habs)
EMU_BFLOAT2_1(h2exp, hexp)
EMU_BFLOAT2_1(h2exp2, hexp2)
EMU_BFLOAT2_1(h2log, hlog)
EMU_BFLOAT2_1(h2log2, hlog2)
EMU_BFLOAT2_1(h2sqrt, hsqrt)
EMU_BFLOAT2_1(h2rsqrt, hrsqrt)
EMU_BFLOAT2_1(h2rcp, hrcp)
EMU_BFLOAT2_1(h2tanh, htanh)
EMU_BFLOAT2_1(operator-, __hneg)
#undef EMU_BFLOAT2_1
static __forceinline__ nv_bfloat162 __hfma2(nv_bfloat162 a, nv_bfloat162 b, nv_bfloat162 c) {
  return nv_bfloat162(__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y));
}
static __forceinline__ nv_bfloat162& operator+=(nv_bfloat162& a, nv_bfloat162 b) { return a = a + b; }
static __forceinline__ nv_bfloat162& operator-=(nv_bfloat162& a, nv_bfloat162 b) { return a = a - b; }
static __forceinline__ nv_bfloat162& operator*=(nv_bfloat162& a, nv_bfloat162 b) { return a = a * b; }
static __forceinline__ nv_bfloat162& operator/=(nv_bfloat162& a, nv_bfloat162 b) { return a = a / b; }
