// Weights in groups -> codes, scales and sums of squares: quantization/group.py, search.py and
// errors.py bit for bit, a thread a group.
//
// Everything is float32 with one rounding an operation: __fmul_rn, __fadd_rn and __fdiv_rn are what
// nvcc neither contracts into fused operations nor approximates. Levels are computed anew in each
// pass, so that a thread keeps nothing of its group.
#pragma once
#include "ptx.cuh"

namespace mlc {
namespace encoding {

// Dtypes and rules by the numbers that encode.py gives them.
enum { FLOAT16, BFLOAT16, FLOAT32 };
enum { ABSMAX, SIGNED, MSE };

__device__ __forceinline__ float half_bits(unsigned bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

__device__ __forceinline__ unsigned to_half_bits(float x) {
  return __half_as_ushort(__float2half_rn(x));
}

// x rounded to a dtype.
__device__ __forceinline__ float rounded(float x, int dtype) {
  if (dtype == FLOAT32) return x;
  if (dtype == FLOAT16) return half_bits(to_half_bits(x));
  const unsigned bits = __float_as_uint(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return x;
  return __uint_as_float((bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u);
}

__device__ __forceinline__ float not_minus_zero(float x) { return x == 0.f ? 0.f : x; }

struct Group {
  const unsigned char* weight;  // its first element
  const float* importance;      // of its first element; null: 1 everywhere
  int size, source, model;
  float top;  // M: the code of weight 0

  __device__ unsigned bits(int e) const {
    if (source == FLOAT32) return reinterpret_cast<const unsigned*>(weight)[e];
    return reinterpret_cast<const unsigned short*>(weight)[e];
  }

  __device__ float wide(int e) const {
    const unsigned found = bits(e);
    if (source == FLOAT16) return half_bits(found);
    return __uint_as_float(source == FLOAT32 ? found : found << 16);
  }

  __device__ float narrow(float x) const {
    return source == model ? x : rounded(x, model);
  }

  // x in units of the scale, whose inverse is not used: w / inf is 0.
  __device__ float plain(float x, float divisor, float most) const {
    float code = rounded(__fdiv_rn(x, divisor), model);
    code = rintf(rounded(__fadd_rn(code, top), model));
    return __fadd_rn(fminf(fmaxf(code, 0.f), most), -top);
  }

  __device__ float nearest(float x, float divisor) const {
    return fminf(fmaxf(rintf(__fdiv_rn(x, divisor)), -top), __fadd_rn(top, 1.f));
  }

  // How a scale is used: most is that of `plain`, below 0 for `nearest`.
  __device__ float level(float x, float divisor, float most) const {
    return most < 0.f ? nearest(x, divisor) : plain(x, divisor, most);
  }

  __device__ float counted(float x, int e) const {
    return importance ? __fmul_rn(x, importance[e]) : x;
  }

  __device__ __noinline__ float error(float scale, float most, bool rounding) const {
    const float divisor = scale == 0.f ? __uint_as_float(0x7f800000u) : scale;
    float total = 0.f;
#pragma unroll 1
    for (int e = 0; e < size; ++e) {
      const float x = narrow(wide(e));
      float back = __fmul_rn(level(x, divisor, most), scale);
      if (rounding) back = rounded(back, model);
      const float difference = __fadd_rn(x, -back);
      total = __fadd_rn(total, counted(__fmul_rn(difference, difference), e));
    }
    return total;
  }

  // For the levels nearest with `scale`, which it is where there is none.
  __device__ __noinline__ float least_squares(float scale) const {
    const float infinity = __uint_as_float(0x7f800000u);
    const float divisor = scale == 0.f ? infinity : scale;
    float above = 0.f, below = 0.f;
#pragma unroll 1
    for (int e = 0; e < size; ++e) {
      const float x = narrow(wide(e)), l = nearest(x, divisor);
      above = __fadd_rn(above, counted(__fmul_rn(x, l), e));
      below = __fadd_rn(below, counted(__fmul_rn(l, l), e));
    }
    const float found = rounded(__fdiv_rn(above, below == 0.f ? infinity : below), model);
    const bool finite = (__float_as_uint(found) & 0x7fffffffu) < 0x7f800000u;
    return finite && found != 0.f ? found : scale;
  }
};

}  // namespace encoding

// memory: all arrays at once, a multiple of 256 bytes each: weights (source bits) [groups, size];
// at `parameters` divisors float32 [64] and importance float32 [a_row, size]; at `results` the
// largest |weight|'s bits (64 words, 0 before), words [groups, size / (32 / bits)], error and square
// float32 [groups], scales (model bits) [groups].
// Group g is number g % a_row of its row; weighted: whether importance is there.
__device__ __forceinline__ void encode(unsigned char* memory, int parameters, int results,
                                       int groups, int size, int a_row, int candidates,
                                       int weighted, int source, int model, int bits, int rule) {
  using namespace encoding;
  const int group = blockIdx.x * blockDim.x + threadIdx.x;
  if (group >= groups) return;
  const float* divisors = reinterpret_cast<const float*>(memory + parameters);
  const int per_word = 32 / bits;
  const size_t stored = static_cast<size_t>(groups) * (size / per_word) * 4;
  const size_t sums = static_cast<size_t>(groups) * 4;
  const auto padded = [](size_t bytes) { return (bytes + 255) / 256 * 256; };
  unsigned char* out = memory + results;
  unsigned* peak = reinterpret_cast<unsigned*>(out);
  unsigned* words = reinterpret_cast<unsigned*>(out += 256);
  float* errors = reinterpret_cast<float*>(out += padded(stored));
  float* squares = reinterpret_cast<float*>(out += padded(sums));
  unsigned char* scales = out + padded(sums);

  Group g;
  const int width = source == FLOAT32 ? 4 : 2;
  g.weight = memory + static_cast<size_t>(group) * size * width;
  g.importance = weighted ? divisors + 64 + static_cast<size_t>(group % a_row) * size : nullptr;
  g.size = size;
  g.source = source;
  g.model = model;
  g.top = static_cast<float>((1 << (bits - 1)) - 1);

  const unsigned mask = source == FLOAT32 ? 0x7fffffffu : 0x7fffu;
  unsigned largest_bits = 0;
  float high = g.narrow(g.wide(0)), low = high;
#pragma unroll 1
  for (int e = 0; e < size; ++e) {
    const unsigned magnitude = g.bits(e) & mask;
    largest_bits = magnitude > largest_bits ? magnitude : largest_bits;
    const float x = g.narrow(g.wide(e));
    high = x > high ? x : high;
    low = x < low ? x : low;
  }
  atomicMax(peak, largest_bits);
  const float extreme = high >= -low ? high : low;
  const float largest = high >= -low ? high : -low;

  // The scale, and how levels come from it (Group::level).
  float scale = not_minus_zero(rounded(__fdiv_rn(largest, g.top), model));
  float most = 2.f * g.top;
  if (rule != ABSMAX) {
    const float all = 2.f * g.top + 1.f;
    const float full = not_minus_zero(rounded(__fdiv_rn(extreme, g.top + 1.f), model));
    if (rule == SIGNED) {
      scale = full;
      most = all;
    } else {
      float found = 0.f, least = 0.f;
#pragma unroll 1
      for (int c = 0; c < candidates; ++c) {
        const float tried = not_minus_zero(rounded(__fdiv_rn(extreme, divisors[c]), model));
        const float error = g.error(tried, -1.f, false);
        if (c == 0 || error < least) {
          least = error;
          found = tried;
        }
      }
      const float refined = g.least_squares(found);
      least = g.error(scale, most, true);
      const float others[3] = {full, found, refined};
#pragma unroll 1
      for (int i = 0; i < 3; ++i) {
        const float way = i == 0 ? all : -1.f;
        const float error = g.error(others[i], way, true);
        if (error < least) {
          least = error;
          scale = others[i];
          most = way;
        }
      }
    }
  }

  const float divisor = scale == 0.f ? __uint_as_float(0x7f800000u) : scale;
  float error[8] = {}, square[8] = {};
  unsigned* word = words + static_cast<size_t>(group) * (size / per_word);
  unsigned packed = 0;
  int filled = 0;
#pragma unroll 1
  for (int first = 0; first < size; first += 8) {
#pragma unroll
    for (int lane = 0; lane < 8; ++lane) {
      const float x = g.wide(first + lane);
      const float level = g.level(g.narrow(x), divisor, most);
      packed |= static_cast<unsigned>(static_cast<int>(level + g.top)) << (filled * bits);
      if (++filled == per_word) {
        *word++ = packed;
        packed = 0;
        filled = 0;
      }
      const float difference = __fadd_rn(rounded(__fmul_rn(level, scale), model), -x);
      error[lane] = __fadd_rn(error[lane], __fmul_rn(difference, difference));
      square[lane] = __fadd_rn(square[lane], __fmul_rn(x, x));
    }
  }
#pragma unroll
  for (int half = 4; half; half /= 2) {
#pragma unroll
    for (int lane = 0; lane < half; ++lane) {
      error[lane] = __fadd_rn(error[lane], error[lane + half]);
      square[lane] = __fadd_rn(square[lane], square[lane + half]);
    }
  }
  errors[group] = error[0];
  squares[group] = square[0];
  if (model == FLOAT32) {
    reinterpret_cast<float*>(scales)[group] = scale;
  } else {
    const unsigned found = model == FLOAT16 ? to_half_bits(scale) : __float_as_uint(scale) >> 16;
    reinterpret_cast<unsigned short*>(scales)[group] = static_cast<unsigned short>(found);
  }
}

}  // namespace mlc
