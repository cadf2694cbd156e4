// One row of x times a weight whose rows are contiguous along K: what decode spends its time on.
//
// Cut. A tile is 8 weight rows (gated: 4 gate rows and their 4 up rows), a step is 16 pieces of 16
// bytes of each of them. A team of warps shares a tile: warp i takes the steps i, i + team, ... A
// block owns neighbouring tiles and deals them to its teams. The copies of `kDepth` steps of a warp
// to its own part of shared memory are under way at any time, across tiles; sums of different warps
// meet in shared memory once, at the end.
//
// Arithmetic. Lane 4 r + t of a warp takes row r, and of every 8 pieces those numbered t and 4 + t.
// Codes become halves in registers, and the matrix unit multiplies them with x and sums in float32:
// the rows 0-7 of its A are the lanes' first pieces, 8-15 the second, and column j of B is x of
// piece j where a lane of that piece holds it in A, else 0, so that the eight pieces of a row come
// out apart: each is then scaled in float32. float32 models use plain float32 arithmetic.
// The products are exact and no half is ever summed. A 4-bit code is multiplied as 1024 + code (or
// 16 times 64 + code) and the excess, the same for all rows, is taken off in float32: that costs
// about seven bits of the sums' 24 (1e-5 of sum |x| |w|), less than rounding x to half has cost.
//
// x lies in shared memory in the order in which codes are unpacked, zeros beyond K.
//
// Dependent launches. The first steps of the weights are on their way while the kernel before this
// one ends. Memory answers about in the order in which it was asked: whatever is asked for before x
// keeps the whole block waiting, hence `kAhead`.
#pragma once
#include "vector.cuh"

namespace mlc {

namespace gemv_detail {

union Piece {  // 16 bytes
  uint4 u;
  uint32_t w[4];
  half h[8];
  __nv_bfloat16 b[8];
  float f[4];
  __device__ __forceinline__ Piece() {}
};
__device__ __forceinline__ half& element(Piece& v, int i, half) { return v.h[i]; }
__device__ __forceinline__ __nv_bfloat16& element(Piece& v, int i, __nv_bfloat16) { return v.b[i]; }
__device__ __forceinline__ float& element(Piece& v, int i, float) { return v.f[i]; }

// Reads of what another kernel has written: past L1, which is not coherent.
__device__ __forceinline__ float load_fresh(const float* p) { return __ldcg(p); }
__device__ __forceinline__ float load_fresh(const half* p) { return __half2float(__ldcg(p)); }
__device__ __forceinline__ float load_fresh(const __nv_bfloat16* p) {
  return __bfloat162float(__ldcg(p));
}

__device__ __forceinline__ uint32_t bits(half2 v) { return *reinterpret_cast<uint32_t*>(&v); }
__device__ __forceinline__ half2 as_half2(uint32_t v) { return *reinterpret_cast<half2*>(&v); }
__device__ __forceinline__ half2 both(float v) { return __float2half2_rn(v); }
__device__ __forceinline__ __nv_bfloat162 as_bfloat162(uint32_t v) {
  return *reinterpret_cast<__nv_bfloat162*>(&v);
}
__device__ __forceinline__ uint32_t bits(__nv_bfloat162 v) {
  return *reinterpret_cast<uint32_t*>(&v);
}

// 1024 + code is a half whose low mantissa bits are the code's; a code further left counts its
// power of two more.
__device__ __forceinline__ uint32_t low_code(uint32_t w, uint32_t mask, float centre) {
  return bits(__hsub2(as_half2(and_or(w, mask, 0x64006400u)), both(1024.f + centre)));
}
__device__ __forceinline__ uint32_t high_code(uint32_t w, uint32_t mask, float unit, float centre) {
  return bits(__hfma2(as_half2(and_or(w, mask, 0x64006400u)), both(1.f / unit),
                      both(-1024.f / unit - centre)));
}

// A format says how a piece of 16 bytes becomes pairs of 16-bit numbers (`unpack`, word by word),
// and which elements of the piece these are: place e of vector v of x for it is its element
// `element(v, e)`.

struct Int4 {
  using X = half;
  static constexpr int kElements = 32, kPairs = 4;  // of a piece; of a word
  static constexpr bool kContiguous = true;         // a vector of x is 8 neighbours
  static constexpr int kGroups = 8;                 // scales of 8 pieces
  static constexpr bool kRaw = true;                // see MatrixUnit
  __host__ __device__ static constexpr int element(int v, int e) {
    return 8 * v + e / 4 + e / 2 % 2 * 2 + e % 2 * 4;  // 0 4 2 6 1 5 3 7
  }
  __device__ static __forceinline__ void unpack(uint32_t w, uint32_t (&p)[kPairs]) {
    const uint32_t h = w >> 8;
    p[0] = and_or(w, 0x000f000fu, 0x64006400u);
    p[1] = and_or(h, 0x000f000fu, 0x64006400u);
    p[2] = and_or(w, 0x00f000f0u, 0x64006400u);
    p[3] = and_or(h, 0x00f000f0u, 0x64006400u);
  }
  // What the codes of a vector of x have too much: 1031 of the low ones, 71 of the high.
  __device__ static __forceinline__ float excess(const half (&x)[8]) {
    float low = 0.f, high = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      low += __half2float(x[i]);
      high += __half2float(x[4 + i]);
    }
    return 1031.f * low + 71.f * high;
  }
};

struct Int4Bfloat {
  using X = __nv_bfloat16;
  static constexpr int kElements = 32, kPairs = 4;
  static constexpr bool kContiguous = true;
  static constexpr bool kRaw = false;
  static constexpr int kGroups = 8;
  __host__ __device__ static constexpr int element(int v, int e) {
    return 8 * v + e / 2 + e % 2 * 4;
  }
  __device__ static __forceinline__ void unpack(uint32_t w, uint32_t (&p)[kPairs]) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      p[i] = bits(__hsub2(as_bfloat162(and_or(w >> 4 * i, 0x000f000f, 0x43004300u)),
                          __float2bfloat162_rn(135.f)));
  }
};

struct Int3 {
  using X = half;
  static constexpr int kElements = 40, kPairs = 5;
  static constexpr bool kContiguous = false;
  static constexpr bool kRaw = false;
  static constexpr int kGroups = 8;
  __host__ __device__ static constexpr int element(int v, int e) {
    return (4 * v + e / 2) / 5 * 10 + (4 * v + e / 2) % 5 + e % 2 * 5;
  }
  __device__ static __forceinline__ void unpack(uint32_t w, uint32_t (&p)[kPairs]) {
    w += w & 0xffff8000u;  // codes 5-9 start at bit 16
    const uint32_t h = w >> 9;
    p[0] = low_code(w, 0x00070007, 3.f);
    p[1] = high_code(w, 0x00380038, 8.f, 3.f);
    p[2] = high_code(w, 0x01c001c0, 64.f, 3.f);
    p[3] = low_code(h, 0x00070007, 3.f);
    p[4] = high_code(h, 0x00380038, 8.f, 3.f);
  }
};

struct Int8 {
  using X = half;
  static constexpr int kElements = 16, kPairs = 2;
  static constexpr bool kContiguous = true;
  static constexpr bool kRaw = false;
  static constexpr int kGroups = 4;
  __host__ __device__ static constexpr int element(int v, int e) {
    return 8 * v + e / 4 * 4 + e / 2 % 2 + e % 2 * 2;
  }
  __device__ static __forceinline__ void unpack(uint32_t w, uint32_t (&p)[kPairs]) {
    p[0] = low_code(w, 0x00ff00ff, 127.f);
    p[1] = low_code(w >> 8, 0x00ff00ff, 127.f);
  }
};

template <class T>
struct Plain {  // 16-bit floats
  using X = T;
  static constexpr int kElements = 8, kPairs = 1;
  static constexpr bool kContiguous = true;
  static constexpr bool kRaw = false;
  static constexpr int kGroups = 0;
  __host__ __device__ static constexpr int element(int v, int e) { return 8 * v + e; }
  __device__ static __forceinline__ void unpack(uint32_t w, uint32_t (&p)[kPairs]) { p[0] = w; }
};

// The arithmetic of one format: what a lane keeps of the weights under way, and its sums.
template <class Format>
struct MatrixUnit {
  using X = typename Format::X;
  static constexpr int kElements = Format::kElements;
  static constexpr int kLane = 8;                    // elements of x in 16 bytes
  static constexpr int kVectors = kElements / kLane;  // of a piece
  static constexpr bool kContiguous = Format::kContiguous;
  static constexpr int kGroups = Format::kGroups;
  __host__ __device__ static constexpr int element(int v, int e) { return Format::element(v, e); }
  __host__ __device__ static constexpr float factor(int) { return 1.f; }

  static constexpr bool kRaw = Format::kRaw;
  static constexpr int kScaleBytes = 2;

  struct Scales {
    uint32_t v;
  };
  float sum[4] = {0.f, 0.f, 0.f, 0.f};

  // This lane's vectors of x: those of piece r where it holds that piece's codes, else zeros.
  __device__ static __forceinline__ bool reads_x(int r, int t) { return (r & 3) == t; }
  __device__ static __forceinline__ int x_piece(int r, int) { return r; }

  __device__ static __forceinline__ float excess_of(const half (&x)[8]) {
    return Format::excess(x);
  }

  // scale: of the row. The pieces 2 t and 2 t + 1 are those whose sums this lane ends up with.
  template <class S>
  __device__ static __forceinline__ Scales load_scales(const S* scale, int step, int t,
                                                       int groups) {
    Scales s;
    s.v = 0;
    if constexpr (kGroups == 8) {
      const int first = step * 8 + 2 * t;
      if (groups % 2 == 0) {
        s.v = __ldg(reinterpret_cast<const uint32_t*>(scale + min(first, groups - 2)));
      } else {
        const unsigned short* at = reinterpret_cast<const unsigned short*>(scale);
        s.v = __ldg(at + min(first, groups - 1)) |
              static_cast<uint32_t>(__ldg(at + min(first + 1, groups - 1))) << 16;
      }
    } else if constexpr (kGroups == 4) {
      const int group = step * 4 + t;
      s.v = __ldg(reinterpret_cast<const unsigned short*>(scale) + min(group, groups - 1));
    }
    return s;
  }

  // The same from shared memory, where those of 8 pieces lie together.
  __device__ static __forceinline__ Scales read_scales(const unsigned char* at, int t) {
    Scales s;
    s.v = 0;
    if constexpr (kGroups == 8) s.v = reinterpret_cast<const uint32_t*>(at)[t];
    if constexpr (kGroups == 4) s.v = reinterpret_cast<const unsigned short*>(at)[t];
    return s;
  }

  // 2 x 8 pieces of 8 rows: the lane's in w, its scales, x of all and what they have too much.
  __device__ __forceinline__ void add(const uint4 (&w)[2][2], const Scales (&scales)[2],
                                      const uint4* x, int x_stride, const float* excess, int t) {
    constexpr int kAll = 4 * Format::kPairs;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t a[kAll], b[kAll];
      const uint32_t first[4] = {w[h][0].x, w[h][0].y, w[h][0].z, w[h][0].w};
      const uint32_t second[4] = {w[h][1].x, w[h][1].y, w[h][1].z, w[h][1].w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t p[Format::kPairs], q[Format::kPairs];
        Format::unpack(first[i], p);
        Format::unpack(second[i], q);
#pragma unroll
        for (int j = 0; j < Format::kPairs; ++j) {
          a[i * Format::kPairs + j] = p[j];
          b[i * Format::kPairs + j] = q[j];
        }
      }
      // Two chains of products, as each waits for the one before.
      float c[4] = {0.f, 0.f, 0.f, 0.f}, d[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const uint4 xs = x[h * x_stride + 8 * v];
        const uint32_t x0[2] = {xs.x, xs.y}, x1[2] = {xs.z, xs.w};
        const uint32_t a0[4] = {a[4 * v], b[4 * v], a[4 * v + 1], b[4 * v + 1]};
        const uint32_t a1[4] = {a[4 * v + 2], b[4 * v + 2], a[4 * v + 3], b[4 * v + 3]};
        mma_m16n8k16(kGroups ? c : sum, a0, x0, X());
        mma_m16n8k16(kGroups ? d : sum, a1, x1, X());
      }
      if constexpr (kGroups != 0) {
        float even = t < 2 ? c[0] : c[2], odd = t < 2 ? c[1] : c[3];
        const float even_d = t < 2 ? d[0] : d[2], odd_d = t < 2 ? d[1] : d[3];
        if constexpr (kRaw) {
          const float2 e = reinterpret_cast<const float2*>(excess)[4 * h + t];
          even = even + (even_d * 0.0625f - e.x);
          odd = odd + (odd_d * 0.0625f - e.y);
        } else {
          even += even_d;
          odd += odd_d;
        }
        const uint32_t s = scales[h].v;
        if constexpr (kGroups == 8) {
          sum[0] += even * scale_of(s & 0xffffu, s << 16, X());
          sum[1] += odd * scale_of(s >> 16, s & 0xffff0000u, X());
        } else {
          sum[0] += (even + odd) * scale_of(s & 0xffffu, s << 16, X());
        }
      }
    }
  }
  // A scale from its 16 bits, in the lower and in the upper half of a word.
  __device__ static __forceinline__ float scale_of(uint32_t low, uint32_t, half) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(low)));
  }
  __device__ static __forceinline__ float scale_of(uint32_t, uint32_t high, __nv_bfloat16) {
    return __uint_as_float(high);
  }

  __device__ __forceinline__ float take(int t) {
    const float total = kGroups ? sum[0] + sum[1] : t < 2 ? sum[0] + sum[1] : sum[2] + sum[3];
    sum[0] = sum[1] = sum[2] = sum[3] = 0.f;
    return total;
  }
};

// float32 models. A code in the low bits of 2^23 leaves that as it is less a constant; a code
// further left counts a power of two more, which x in shared memory has been divided by.
template <int kBits>
struct Scalar {
  using X = float;
  static constexpr int kPerWord = kBits == 32 ? 1 : 32 / kBits;
  static constexpr int kElements = 4 * kPerWord;
  static constexpr int kLane = 4;
  static constexpr int kVectors = kElements / kLane;
  static constexpr bool kContiguous = true;
  static constexpr int kGroups = kBits == 4 ? 8 : kBits == 8 ? 4 : 0;
  // Codes whose bits lie below bit 20 (of 8 bits: 16) are read in place, the others shifted down.
  static constexpr int kLow = kBits == 4 ? 5 : 2;
  __host__ __device__ static constexpr int place(int i) {
    return kBits * (i < kLow ? i : i - kLow);
  }
  __host__ __device__ static constexpr int element(int v, int e) { return 4 * v + e; }
  __host__ __device__ static constexpr float factor(int i) {
    return kBits == 32 ? 1.f : 1.f / static_cast<float>(1 << place(i % kPerWord));
  }

  static constexpr bool kRaw = false;
  static constexpr int kScaleBytes = 4;

  struct Scales {
    float v[2];
  };
  float sum = 0.f;

  __device__ static __forceinline__ bool reads_x(int, int) { return true; }
  __device__ static __forceinline__ int x_piece(int, int t) { return t; }

  template <class S>
  __device__ static __forceinline__ Scales load_scales(const S* scale, int step, int t,
                                                       int groups) {
    Scales s = {{1.f, 1.f}};
    if constexpr (kGroups == 8) {
      s.v[0] = __ldg(scale + min(step * 8 + t, groups - 1));
      s.v[1] = __ldg(scale + min(step * 8 + 4 + t, groups - 1));
    } else if constexpr (kGroups == 4) {
      s.v[0] = __ldg(scale + min(step * 4 + t / 2, groups - 1));
      s.v[1] = __ldg(scale + min(step * 4 + 2 + t / 2, groups - 1));
    }
    return s;
  }

  __device__ static __forceinline__ Scales read_scales(const unsigned char* at, int t) {
    const float* f = reinterpret_cast<const float*>(at);
    Scales s = {{1.f, 1.f}};
    if constexpr (kGroups == 8) s = {{f[t], f[4 + t]}};
    if constexpr (kGroups == 4) s = {{f[t / 2], f[2 + t / 2]}};
    return s;
  }

  __device__ __forceinline__ void add(const uint4 (&w)[2][2], const Scales (&scales)[2],
                                      const uint4* x, int x_stride, const float*, int) {
#pragma unroll
    for (int piece = 0; piece < 4; ++piece) {
      Piece words;
      words.u = w[piece / 2][piece % 2];
      float part = 0.f;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        Piece xs;
        xs.u = x[piece / 2 * x_stride + 8 * v + 4 * (piece % 2)];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if constexpr (kBits == 32) {
            part += words.f[e] * xs.f[e];
          } else {
            const int i = (4 * v + e) % kPerWord;
            uint32_t word = words.w[(4 * v + e) / kPerWord];
            if (i >= kLow) word >>= kBits * kLow;
            const uint32_t mask = ((1u << kBits) - 1) << place(i);
            const float centre = static_cast<float>(((1 << (kBits - 1)) - 1) << place(i));
            part += (__uint_as_float(and_or(word, mask, 0x4b000000u)) - (8388608.f + centre)) *
                    xs.f[e];
          }
        }
      }
      sum += part * scales[piece / 2].v[piece % 2];
    }
  }

  __device__ __forceinline__ float take(int) {
    const float total = sum;
    sum = 0.f;
    return total;
  }
};

}  // namespace gemv_detail

namespace gemv_format {
using packed4 = gemv_detail::MatrixUnit<gemv_detail::Int4>;
using packed4_bfloat16 = gemv_detail::MatrixUnit<gemv_detail::Int4Bfloat>;
using packed3 = gemv_detail::MatrixUnit<gemv_detail::Int3>;
using packed8 = gemv_detail::MatrixUnit<gemv_detail::Int8>;
using float16 = gemv_detail::MatrixUnit<gemv_detail::Plain<half>>;
using bfloat16 = gemv_detail::MatrixUnit<gemv_detail::Plain<__nv_bfloat16>>;
using packed4_float32 = gemv_detail::Scalar<4>;
using packed8_float32 = gemv_detail::Scalar<8>;
using float32 = gemv_detail::Scalar<32>;
}  // namespace gemv_format

constexpr int kGemvNorm = 1, kGemvBias = 2, kGemvResidual = 4, kGemvGated = 8, kGemvDependent = 16;

// out[N] = W x (+ bias) (+ residual), or silu(W_gate x) * (W_up x) of N = 2 I rows; x may be
// replaced by its norm first, rounded to its type.
//
// Threads 32 kWarps; blocks share out the tiles as they are launched. Operands that kFlags does not
// name are not touched. kAhead: of kDepth, the steps that a dependent block asks for before its
// turn has come. groups: scales of a row. team: warps of a team, a divisor of kWarps. memory:
// 16-byte aligned, of the size in gemv.py.
template <class Format, int kWarps, int kDepth, int kAhead, int kFlags, class Scale, class Bias,
          class Out>
__device__ __forceinline__ void gemv(const typename Format::X* x, const typename Format::X* norm,
                                     const void* weight, const Scale* scale, const Bias* bias,
                                     const Out* residual, Out* out, int n, int k, int groups,
                                     float eps, int team, unsigned char* memory) {
  using namespace gemv_detail;
  using X = typename Format::X;
  constexpr bool kNorm = kFlags & kGemvNorm, kBias = kFlags & kGemvBias;
  constexpr bool kResidual = kFlags & kGemvResidual, kGated = kFlags & kGemvGated;
  constexpr bool kDependent = kFlags & kGemvDependent;
  constexpr int kThreads = 32 * kWarps, kRows = kGated ? 4 : 8, kVectors = Format::kVectors;
  constexpr int kLane = Format::kLane;

  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int r = lane / 4, t = lane % 4;
  const int pieces = (k + Format::kElements - 1) / Format::kElements;
  // In a packed weight a group may have more pieces than K asks for: rows are whole groups.
  const int pitch = Format::kGroups == 4 ? 2 * groups : Format::kGroups ? groups : pieces;
  const int steps = (pieces + 15) / 16;
  const int half_n = n / 2;
  const int tiles = kGated ? (half_n + 3) / 4 : (n + 7) / 8;
  const int blocks = gridDim.x, block = blockIdx.x;
  // Of a product that fits 32 bits: 2^15 rows a block and 2^16 blocks.
  const int first_tile = static_cast<int>(static_cast<unsigned>(tiles) * block / blocks);
  const int last_tile = static_cast<int>(static_cast<unsigned>(tiles) * (block + 1) / blocks);
  const int teams = kWarps / team, my_team = warp / team, my_step = warp % team;

  constexpr int kScales = 2 * Format::kGroups * Format::kScaleBytes;  // bytes of a row and step
  constexpr int kCopies = kScales / 16, kSpan = 16 / Format::kScaleBytes;
  constexpr int kSlot = 128 + 8 * kCopies;  // vectors of a step: 8 rows of pieces, scales
  const int vectors = steps * 16 * kVectors;
  uint4* xs = reinterpret_cast<uint4*>(memory) + kWarps * kDepth * kSlot;  // [2 steps][kVectors][8]
  uint4* zeros = xs + vectors;                                             // [kVectors][8]
  float* excess = reinterpret_cast<float*>(zeros + 8 * kVectors);          // [16 steps], where kRaw
  X* ws = reinterpret_cast<X*>(excess + (Format::kRaw ? 16 * steps : 0));  // [k], where kNorm
  float* sums = reinterpret_cast<float*>(reinterpret_cast<uint4*>(ws) + (kNorm ? vectors : 0));
  __shared__ float squares[kWarps];

  // ---- weights under way
  struct Cursor {
    int tile, step;
  };
  Cursor next = {first_tile + my_team, my_step}, here = next;
  if (my_step >= steps) next.tile = here.tile = last_tile;
  auto advance = [&](Cursor& c) {
    c.step += team;
    if (c.step >= steps) {
      c.step = my_step;
      c.tile += teams;
    }
  };
  // Lanes ask for whole lines of 128 bytes, and read what others asked for. In odd rows the two
  // halves change places, so that the lanes of two rows meet no common bank.
  uint4* ring = reinterpret_cast<uint4*>(memory) + warp * (kDepth * kSlot);
  const int slot_first = r * 16 + (t ^ r % 2 * 4), slot_second = slot_first ^ 4;
  const int copy_row = lane / 16, copy_piece = lane % 16;
  const bool async_scales = kCopies != 0 && groups % kSpan == 0;
  typename Format::Scales scales[kDepth][2];  // else
  auto row_of = [&](int tile, int row) {   // beyond the last, that again
    int at = tile * kRows + row % kRows;
    if ((kGated ? half_n : n) % kRows != 0) at = min(at, (kGated ? half_n : n) - 1);
    return kGated && row >= 4 ? at + half_n : at;
  };
  auto fetch = [&](int slot) {
    if (next.tile < last_tile) {
      int piece = next.step * 16 + copy_piece;
      if (pitch % 16 != 0) piece = min(piece, pitch - 1);  // x is zero there
      const uint4* at = static_cast<const uint4*>(weight) + piece;
      uint4* to = ring + slot * kSlot;
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        const int row = i + copy_row;
        copy_async_16(to + row * 16 + (copy_piece ^ copy_row * 4),
                      at + static_cast<uint32_t>(row_of(next.tile, row) * pitch));
      }
      const Scale* scales_at = scale + static_cast<uint32_t>(row_of(next.tile, r) * groups);
      if (async_scales) {
        const int first = min(next.step * 2 * Format::kGroups + t * kSpan, groups - kSpan);
        if (t < kCopies) copy_async_16(to + 128 + r * kCopies + t, scales_at + first);
      } else {
        scales[slot][0] = Format::load_scales(scales_at, 2 * next.step, t, groups);
        scales[slot][1] = Format::load_scales(scales_at, 2 * next.step + 1, t, groups);
      }
      advance(next);
    }
    copy_async_commit();
  };
  if constexpr (kNorm) {
    if (k % kLane == 0) {
      for (int i = thread; i < k / kLane; i += kThreads)
        copy_async_16(ws + i * kLane, norm + i * kLane);
    } else {
      for (int i = thread; i < k; i += kThreads) ws[i] = norm[i];
    }
    copy_async_commit();
  }
#pragma unroll
  for (int d = 0; d < kAhead; ++d) fetch(d);

  // ---- what else does not depend on the kernel before
  auto place = [&](int i) {  // of the i-th vector of x, counted along K
    const int piece = i / kVectors;
    return ((piece / 8) * kVectors + i % kVectors) * 8 + piece % 8;
  };
  const bool whole = Format::kContiguous && k % kLane == 0;
  auto load_x = [&](int i) {  // as it lies in memory if `whole`, else as it is multiplied
    Piece v;
    v.u = make_uint4(0, 0, 0, 0);
    if (whole) {
      if (i * kLane < k) v.u = __ldcg(reinterpret_cast<const uint4*>(x) + i);
    } else {
#pragma unroll
      for (int e = 0; e < kLane; ++e) {
        const int at = i / kVectors * Format::kElements + Format::element(i % kVectors, e);
        if (at < k) element(v, e, X()) = from_float<X>(load_fresh(x + at));
      }
    }
    return v;
  };
  for (int i = thread; i < 8 * kVectors; i += kThreads) zeros[i] = make_uint4(0, 0, 0, 0);
  if constexpr (kDependent) grid_dependency_wait();

  // ---- x
  constexpr int kBatch = 4;
  Piece batch[kBatch];
#pragma unroll
  for (int b = 0; b < kBatch; ++b)
    if (thread + b * kThreads < vectors) batch[b] = load_x(thread + b * kThreads);
  // Not before x is asked for: it would come after all of the weights that were before it.
  auto fetch_others = [&] {
#pragma unroll
    for (int d = kAhead; d < kDepth; ++d) fetch(d);
  };
  auto each = [&](auto use) {  // of this thread's vectors of x
#pragma unroll
    for (int b = 0; b < kBatch; ++b)
      if (thread + b * kThreads < vectors) use(thread + b * kThreads, batch[b]);
    for (int i = thread + kBatch * kThreads; i < vectors; i += kThreads) use(i, load_x(i));
  };
  const int outputs = (last_tile - first_tile) * kRows;
  const int n_out = kGated ? half_n : n;
  const int my_out = first_tile * kRows + thread;
  float add = 0.f;
  if constexpr (kResidual)
    if (thread < outputs && my_out < n_out) add = load_fresh(residual + my_out);
  float inverse = 1.f;
  if constexpr (kNorm) {
    float square = 0.f;
    each([&](int, Piece v) {
#pragma unroll
      for (int e = 0; e < kLane; ++e) {
        const float f = to_float(element(v, e, X()));
        square += f * f;
      }
    });
#pragma unroll
    for (int o = 16; o; o >>= 1) square += __shfl_xor_sync(0xffffffffu, square, o);
    if (lane == 0) squares[warp] = square;
    fetch_others();
    copy_async_wait<kDepth>();  // the norm's weight: all but the steps
    __syncthreads();
    square = 0.f;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) square += squares[i];
    inverse = rsqrtf(square / static_cast<float>(k) + eps);
  }
  each([&](int i, Piece raw) {
    Piece v, w;
    w.u = make_uint4(0, 0, 0, 0);
    if (kNorm && whole && i * kLane < k) w.u = reinterpret_cast<const uint4*>(ws)[i];
#pragma unroll
    for (int e = 0; e < kLane; ++e) {
      const int from = whole ? Format::element(0, e) : e;
      float f = to_float(element(raw, from, X()));
      if constexpr (kNorm) {
        if (whole) {
          f *= inverse * to_float(element(w, from, X()));
        } else {
          const int at = i / kVectors * Format::kElements + Format::element(i % kVectors, e);
          f = at < k ? f * inverse * to_float(ws[at]) : 0.f;
        }
      }
      if constexpr (sizeof(X) == 4) f *= Format::factor(i % kVectors * kLane + e);
      if (kNorm || sizeof(X) == 4)
        element(v, e, X()) = from_float<X>(f);
      else
        element(v, e, X()) = element(raw, from, X());
    }
    xs[place(i)] = v.u;
    if constexpr (Format::kRaw) {  // the 4 vectors of a piece: whole warps are here
      float sum = Format::excess_of(v.h);
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (i % 4 == 0) excess[i / 4] = sum;
    }
  });
  if constexpr (!kNorm) fetch_others();
  __syncthreads();
  // Earlier, the next kernel's first weights would keep x waiting.
  if constexpr (kDependent) grid_dependency_launch();

  // ---- products
  const bool reads = Format::reads_x(r, t);
  const uint4* my_x = reads ? xs + Format::x_piece(r, t) : zeros;
  const int x_stride = reads ? 8 * kVectors : 0;
  Format state;
  while (here.tile < last_tile) {
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      if (here.tile < last_tile) {
        copy_async_wait<kDepth - 1>();
        __syncwarp();
        const uint4* from = ring + d * kSlot;
        const uint4 words[2][2] = {{from[slot_first], from[slot_second]},
                                   {from[slot_first + 8], from[slot_second + 8]}};
        if (async_scales) {
          const unsigned char* at =
              reinterpret_cast<const unsigned char*>(from + 128) + r * kScales;
          scales[d][0] = Format::read_scales(at, t);
          scales[d][1] = Format::read_scales(at + kScales / 2, t);
        }
        state.add(words, scales[d], my_x + 2 * here.step * x_stride, x_stride,
                  excess + 16 * here.step, t);
        __syncwarp();
        fetch(d);
        const int tile = here.tile;
        advance(here);
        if (here.tile != tile) {
          float total = state.take(t);
          total += __shfl_xor_sync(0xffffffffu, total, 1);
          total += __shfl_xor_sync(0xffffffffu, total, 2);
          if (t == 0) sums[((tile - first_tile) * team + my_step) * 8 + r] = total;
        }
      }
    }
  }
  __syncthreads();

  // ---- outputs
  const int sharing = min(team, steps);
  for (int i = thread; i < outputs; i += kThreads) {
    const int tile = i / kRows, row = i % kRows, at = first_tile * kRows + i;
    if (at >= n_out) break;
    const float* from = sums + tile * team * 8 + row;
    float total = 0.f, up = 0.f;
#pragma unroll 8
    for (int s = 0; s < sharing; ++s) {
      total += from[8 * s];
      if constexpr (kGated) up += from[8 * s + 4];
    }
    if constexpr (kBias) {
      total += to_float(bias[at]);
      if constexpr (kGated) up += to_float(bias[at + half_n]);
    }
    if constexpr (kGated) total = total / (1.f + __expf(-total)) * up;
    if constexpr (kResidual) total += i == thread ? add : load_fresh(residual + at);
    out[at] = from_float<Out>(total);
  }
}

// The same as a dependent launch.
template <class Format, int kWarps, int kDepth, int kAhead, int kFlags, class Scale, class Bias,
          class Out>
__device__ __forceinline__ void gemv_dependent(
    const typename Format::X* x, const typename Format::X* norm, const void* weight,
    const Scale* scale, const Bias* bias, const Out* residual, Out* out, int n, int k, int groups,
    float eps, int team, unsigned char* memory) {
  gemv<Format, kWarps, kDepth, kAhead, kFlags | kGemvDependent>(
      x, norm, weight, scale, bias, residual, out, n, k, groups, eps, team, memory);
}

}  // namespace mlc
