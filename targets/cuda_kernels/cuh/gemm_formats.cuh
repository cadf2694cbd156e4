// Weights as the matrix units want them: two neighbouring 16-bit elements of a fragment ("pair") from
// the packed words of a row, dequantised in registers. Used by gemm_rows.cuh and gemm_mma.cuh.
//
// The order of k inside a fragment is free as long as both operands agree. So a lane keeps whole
// words of a row, and takes the codes two by two as they come out of a word with one mask:
// `unpack` gives the pairs of a piece of a weight row, `arrange` the same elements of a row of x.
//
// A format has
//   Element             of x and of the fragments
//   kGroup              elements that share a scale; 0 without scales
//   kPieceWords         32-bit words of a piece
//   kPairs              pairs of a piece, an even number
//   kUnit               elements in 16 bytes of a row
#pragma once
#include "vector.cuh"

namespace mlc {
namespace gemm_format {

__device__ __forceinline__ half2 as_half2(uint32_t bits) {
  return *reinterpret_cast<const half2*>(&bits);
}

__device__ __forceinline__ uint32_t as_bits(half2 pair) {
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// 0x6400 is 1024 in float16, whose last bits count ones: a code put there by a mask is 1024 + code,
// one that stands `1 / kUnit` higher is taken down again, exactly, by the multiplication.
__device__ __forceinline__ uint32_t scaled(uint32_t masked, float minus, half2 scale) {
  return as_bits(__hmul2(__hsub2(as_half2(masked), __float2half2_rn(minus)), scale));
}

__device__ __forceinline__ uint32_t scaled(uint32_t masked, float unit, float minus, half2 scale) {
  const half2 code = __hfma2(as_half2(masked), __float2half2_rn(unit), __float2half2_rn(-minus));
  return as_bits(__hmul2(code, scale));
}

struct Q4 {
  using Element = half;
  static constexpr int kGroup = 32, kUnit = 32, kPieceWords = 1, kPairs = 4;

  // (0, 4), (1, 5), (2, 6), (3, 7)
  static __device__ __forceinline__ void unpack(const uint32_t* words, half2 scale,
                                                uint32_t (&pairs)[kPairs]) {
    const uint32_t low = words[0], high = low >> 8;
    pairs[0] = scaled(and_or(low, 0x000f000f, 0x64006400), 1031.f, scale);
    pairs[1] = scaled(and_or(low, 0x00f000f0, 0x64006400), 1.f / 16, 71.f, scale);
    pairs[2] = scaled(and_or(high, 0x000f000f, 0x64006400), 1031.f, scale);
    pairs[3] = scaled(and_or(high, 0x00f000f0, 0x64006400), 1.f / 16, 71.f, scale);
  }

  static __device__ __forceinline__ void arrange(const uint32_t* x, uint32_t (&pairs)[kPairs]) {
    pairs[0] = __byte_perm(x[0], x[2], 0x5410);
    pairs[1] = __byte_perm(x[0], x[2], 0x7632);
    pairs[2] = __byte_perm(x[1], x[3], 0x5410);
    pairs[3] = __byte_perm(x[1], x[3], 0x7632);
  }
};

struct Q3 {
  using Element = half;
  static constexpr int kGroup = 40, kUnit = 40, kPieceWords = 2, kPairs = 10;

  // (0, 5), (1, 6), (2, 7), (3, 8), (4, 9) of either word
  static __device__ __forceinline__ void unpack(const uint32_t* words, half2 scale,
                                                uint32_t (&pairs)[kPairs]) {
#pragma unroll
    for (int i = 0; i < kPieceWords; ++i) {
      // Five codes in each half.
      const uint32_t low = and_or(words[i] << 1, 0x7fff0000, words[i] & 0x7fff), high = low >> 9;
      uint32_t* p = pairs + 5 * i;
      p[0] = scaled(and_or(low, 0x00070007, 0x64006400), 1027.f, scale);
      p[1] = scaled(and_or(low, 0x00380038, 0x64006400), 1.f / 8, 131.f, scale);
      p[2] = scaled(and_or(low, 0x01c001c0, 0x64006400), 1.f / 64, 19.f, scale);
      p[3] = scaled(and_or(high, 0x00070007, 0x64006400), 1027.f, scale);
      p[4] = scaled(and_or(high, 0x00380038, 0x64006400), 1.f / 8, 131.f, scale);
    }
  }

  static __device__ __forceinline__ void arrange(const uint32_t* x, uint32_t (&pairs)[kPairs]) {
#pragma unroll
    for (int i = 0; i < kPieceWords; ++i) {
      const uint32_t* v = x + 5 * i;
      uint32_t* p = pairs + 5 * i;
      p[0] = __byte_perm(v[0], v[2], 0x7610);
      p[1] = __byte_perm(v[0], v[3], 0x5432);
      p[2] = __byte_perm(v[1], v[3], 0x7610);
      p[3] = __byte_perm(v[1], v[4], 0x5432);
      p[4] = __byte_perm(v[2], v[4], 0x7610);
    }
  }
};

struct Q8 {
  using Element = half;
  static constexpr int kGroup = 32, kUnit = 16, kPieceWords = 2, kPairs = 4;

  static __device__ __forceinline__ void unpack(const uint32_t* words, half2 scale,
                                                uint32_t (&pairs)[kPairs]) {
#pragma unroll
    for (int i = 0; i < kPieceWords; ++i) {
      pairs[2 * i] = scaled(__byte_perm(words[i], 0x64646464, 0x4140), 1151.f, scale);
      pairs[2 * i + 1] = scaled(__byte_perm(words[i], 0x64646464, 0x4342), 1151.f, scale);
    }
  }

  static __device__ __forceinline__ void arrange(const uint32_t* x, uint32_t (&pairs)[kPairs]) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) pairs[i] = x[i];
  }
};

template <class Type>
struct Plain {
  using Element = Type;
  static constexpr int kGroup = 0, kUnit = 8, kPieceWords = 4, kPairs = 4;

  static __device__ __forceinline__ void unpack(const uint32_t* words, half2,
                                                uint32_t (&pairs)[kPairs]) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) pairs[i] = words[i];
  }

  static __device__ __forceinline__ void arrange(const uint32_t* x, uint32_t (&pairs)[kPairs]) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) pairs[i] = x[i];
  }
};

// How many 16-byte pieces and how many scales a weight row of `k` elements has.
template <class Format>
__device__ __forceinline__ constexpr int row_units(int k) {
  if constexpr (Format::kGroup == 0) return k / Format::kUnit;
  else return (k + Format::kGroup - 1) / Format::kGroup * (Format::kGroup / Format::kUnit);
}

template <class Format>
__device__ __forceinline__ constexpr int row_scales(int k) {
  if constexpr (Format::kGroup == 0) return 0;
  else return (k + Format::kGroup - 1) / Format::kGroup;
}

// out[0..3] = v + bias + residual, rounded once; all aligned as four elements.
template <bool kBias, bool kResidual, class B, class O>
__device__ __forceinline__ void store_quad(float4 v, const B* bias, const O* residual, O* out) {
  float sums[4] = {v.x, v.y, v.z, v.w};
  if constexpr (kBias) {
    const Vector<B, 4> more = load_vector<4>(bias);
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[e] += to_float(more.at[e]);
  }
  if constexpr (kResidual) {
    const Vector<O, 4> more = load_vector<4>(residual);
#pragma unroll
    for (int e = 0; e < 4; ++e) sums[e] += to_float(more.at[e]);
  }
  Vector<O, 4> rounded;
#pragma unroll
  for (int e = 0; e < 4; ++e) rounded.at[e] = from_float<O>(sums[e]);
  store_vector(out, rounded);
}

}  // namespace gemm_format
}  // namespace mlc
