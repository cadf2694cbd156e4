// Matrix product of many rows with the warpgroup instructions of Hopper: out [n, N] = x [n, K] W^T.
//
// A block computes a tile of 64 * Warpgroups rows of W by Columns rows of x, transposed: the weights
// are the matrix a of wgmma, which may come from registers, where they are expanded from their packed
// form; x is the matrix b, in shared memory. Weights go from memory to registers without a stop:
// lane c of a quad holds the group c of every four (128 k), so that it reads 16 bytes of 4-bit codes
// and one scale. The k of x are put in the order that this implies by a first kernel (tile_rows),
// which leaves tiles that are fetched in one bulk copy each.
//
// The order, for a chunk of 128 k: product t (0..7) of 16 takes at its place 8a + 2c + e
// (a, e: 0, 1; c: 0..3) the element k = 32c + 8i + j, i = t / 2, j = 2 (t % 2) + a + 4e: of lane c,
// word i of 4-bit codes, codes j and j + 4, which are 16 bits apart. For plain weights it is k = 32i
// + 8c + j, so that the lanes of a quad read 64 bytes in a row.
#pragma once
#include "ptx_sm90.cuh"

namespace mlc {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ half2 as_pair(uint32_t v, half) {
  return *reinterpret_cast<half2*>(&v);
}
__device__ __forceinline__ __nv_bfloat162 as_pair(uint32_t v, __nv_bfloat16) {
  return *reinterpret_cast<__nv_bfloat162*>(&v);
}
template <typename Pair>
__device__ __forceinline__ uint32_t as_bits(Pair v) {
  return *reinterpret_cast<uint32_t*>(&v);
}
__device__ __forceinline__ half2 round_pair(float a, float b, half) {
  return __floats2half2_rn(a, b);
}
__device__ __forceinline__ __nv_bfloat162 round_pair(float a, float b, __nv_bfloat16) {
  return __floats2bfloat162_rn(a, b);
}

// ptx: load_streaming that brings 256 bytes to L2. For rows of more than 4 bits, whose 128 k don't
// come along with the first of them.
__device__ __forceinline__ uint4 load_streaming_ahead(const void* p) {
#if defined(MLC_CUDA_EMULATOR)
  return load_streaming(p);
#else
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
#endif
}

// What a lane holds of one row of W for 128 k: 32 weights of `Bits`.
template <int Bits>
struct LaneWeights {
  static constexpr int kPieces = Bits / 4;
  uint4 pieces[kPieces];

  __device__ __forceinline__ uint32_t word(int i) const {
    const uint4& v = pieces[i / 4];
    return i % 4 == 0 ? v.x : i % 4 == 1 ? v.y : i % 4 == 2 ? v.z : v.w;
  }
};

// Elements j, j + 4 (`low`) and j + 1, j + 5 (`high`) of eight, j = 2 (t % 2), for product t. Codes
// are written into the mantissa of 1024 (128 in bfloat16), which is then taken off: exact; the
// product with the scale rounds once.
__device__ __forceinline__ void expand(const LaneWeights<4>& w, int t, half scale, uint32_t& low,
                                       uint32_t& high) {
  const half2 s = __half2half2(scale);
  const uint32_t word = t % 2 ? w.word(t / 2) >> 8 : w.word(t / 2);
  const half2 a = as_pair(and_or(word, 0x000f000f, 0x64006400), half());
  const half2 b = as_pair(and_or(word, 0x00f000f0, 0x64006400), half());  // 1024 + 16 code
  low = as_bits(__hmul2(__hsub2(a, as_pair(0x64076407, half())), s));
  high = as_bits(__hmul2(
      __hfma2(b, as_pair(0x2c002c00, half()), as_pair(0xd470d470, half())), s));  // / 16 - 71
}

__device__ __forceinline__ void expand(const LaneWeights<4>& w, int t, __nv_bfloat16 scale,
                                       uint32_t& low, uint32_t& high) {
  using Half = __nv_bfloat16;
  const __nv_bfloat162 s = __bfloat162bfloat162(scale);
  const uint32_t word = t % 2 ? w.word(t / 2) >> 8 : w.word(t / 2);
  const __nv_bfloat162 a = as_pair(and_or(word, 0x000f000f, 0x43004300), Half());
  const __nv_bfloat162 b = as_pair(and_or(word >> 4, 0x000f000f, 0x43004300), Half());
  const __nv_bfloat162 zero = as_pair(0x43074307, Half());  // 128 + 7
  low = as_bits(__hmul2(__hsub2(a, zero), s));
  high = as_bits(__hmul2(__hsub2(b, zero), s));
}

__device__ __forceinline__ void expand(const LaneWeights<8>& w, int t, half scale, uint32_t& low,
                                       uint32_t& high) {
  const half2 s = __half2half2(scale);
  const uint32_t first = w.word(t / 2 * 2), second = w.word(t / 2 * 2 + 1);
  const int j = t % 2 * 2;
  const uint32_t a = __byte_perm(first, second, j | (4 + j) << 8);
  const uint32_t b = __byte_perm(first, second, (j + 1) | (5 + j) << 8);
  const half2 zero = as_pair(0x647f647f, half());  // 1024 + 127
  low = as_bits(__hmul2(__hsub2(as_pair(and_or(a, 0x00ff00ff, 0x64006400), half()), zero), s));
  high = as_bits(__hmul2(__hsub2(as_pair(and_or(b, 0x00ff00ff, 0x64006400), half()), zero), s));
}

template <typename Half>
__device__ __forceinline__ void expand(const LaneWeights<16>& w, int t, Half, uint32_t& low,
                                       uint32_t& high) {
  const uint32_t first = w.word(t / 2 * 4 + t % 2), second = w.word(t / 2 * 4 + t % 2 + 2);
  low = __byte_perm(first, second, 0x5410);
  high = __byte_perm(first, second, 0x7632);
}

#endif

// x [n, K] into tiles [n / Columns, K / 64, Columns, 64] (both rounded up, K to 128, zeros there), in
// the order of k above, and each row's 16-byte pieces in that of wgmma_descriptor. K % 8 == 0.
// Grid (K / 128, rows / 64), both rounded up, the rows to Columns; 256 threads.
template <int Columns, bool Plain>
__device__ __forceinline__ void tile_rows(const void* x, void* tiles, int n, int K) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kHalf = 64 * 128;  // bytes: 64 rows of 64 k
  // The 32 bytes between the halves keep the stores of a warp apart.
  __shared__ __align__(16) unsigned char staging[2 * kHalf + 32];
  const int chunk = blockIdx.x, chunks = (K + 127) / 128, first_row = blockIdx.y * 64;
  const int piece = threadIdx.x % 16, k = chunk * 128 + 8 * piece;
  const int c = Plain ? piece % 4 : piece / 4, i = Plain ? piece / 4 : piece % 4;
  uint4 v[4];
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    const int row = first_row + threadIdx.x / 16 + 16 * p;
    v[p] = row < n && k < K
               ? static_cast<const uint4*>(x)[(static_cast<size_t>(row) * K + k) / 8]
               : make_uint4(0, 0, 0, 0);
  }
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    const int row = threadIdx.x / 16 + 16 * p;
    unsigned char* target = staging + i / 2 * (kHalf + 32) + row * 128 + 4 * c;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t low = j < 2 ? v[p].x : v[p].y, high = j < 2 ? v[p].z : v[p].w;
      *reinterpret_cast<uint32_t*>(target + ((i % 2 * 4 + j) ^ (row % 8)) * 16) =
          __byte_perm(low, high, j % 2 ? 0x7632 : 0x5410);
    }
  }
  __syncthreads();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const size_t tile = static_cast<size_t>(first_row / Columns) * (2 * chunks) + 2 * chunk + h;
    uint4* target = static_cast<uint4*>(tiles) + (tile * Columns + first_row % Columns) * 8;
#pragma unroll
    for (int p = 0; p < 2; ++p)
      target[threadIdx.x + 256 * p] = *reinterpret_cast<const uint4*>(
          staging + h * (kHalf + 32) + (threadIdx.x + 256 * p) * 16);
  }
#endif
}

// Bytes of dynamic shared memory of gemm_sm90: 1024 + Stages * Columns * 128 + Warpgroups * Columns
// * 144. Grid (n / Columns, N / (64 * Warpgroups), splits), rounded up; threads 128 * Warpgroups.
//
// tiles: of tile_rows. weight: packed words or plain weights, [N, K] row-major. scales: [N, K / 32]
// (any pointer for plain weights). bias [N] and residual [n, N] are read where the flags say so.
// out: with `chunks` (of 128 k a block) less than all, block z writes its part of the sum at out +
// z * n * N (float32, without bias and residual: sum_splits adds them).
template <typename Half, typename Out, int Bits, int Warpgroups, int Columns, int Stages, bool Bias,
          bool Residual>
__device__ __forceinline__ void gemm_sm90(const void* tiles, const void* weight, const void* scales,
                                          const void* bias, const void* residual, void* result,
                                          int n, int N, int K, int chunks, unsigned char* shared) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr int kTileBytes = Columns * 128;
  constexpr int kStagingRow = 72;  // elements, for 64: 16 bytes more avoid bank conflicts
  __shared__ uint64_t full[Stages], empty[Stages];
  unsigned char* stages = shared + (1024 - shared_address(shared) % 1024) % 1024;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int all_chunks = (K + 127) / 128;
  const int first = blockIdx.z * chunks;
  const int last = min(first + chunks, all_chunks);
  if (threadIdx.x == 0) {
    for (int s = 0; s < Stages; ++s) {
      barrier_init(&full[s], 1);
      barrier_init(&empty[s], 4 * Warpgroups);
    }
    barrier_init_done();
  }
  __syncthreads();

  const unsigned char* tile =
      static_cast<const unsigned char*>(tiles) +
      (static_cast<size_t>(blockIdx.x) * all_chunks + first) * (2 * kTileBytes);
  const int steps = 2 * (last - first);
  auto fetch = [&](int step, int stage) {
    barrier_arrive_expect(&full[stage], kTileBytes);
    copy_bulk(stages + stage * kTileBytes, tile + static_cast<size_t>(step) * kTileBytes, kTileBytes,
              &full[stage]);
  };
  if (threadIdx.x == 0) {
    for (int step = 0; step < min(steps, Stages); ++step) fetch(step, step);
  }

  const int group = warp / 4, quad = lane / 4, c = lane % 4;
  const int tile_row = blockIdx.y * (64 * Warpgroups) + 64 * group;  // of W
  const int row = tile_row + 16 * (warp % 4) + quad;                 // and row + 8
  // Of packed weights a lane has one group of four, of plain ones 8 of every 32 k.
  constexpr bool kPlain = Bits == 16;
  constexpr int kPieces = LaneWeights<Bits>::kPieces, kPieceStep = kPlain ? 64 : 16;
  uint32_t offset[2], scale_offset[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t groups =
        static_cast<uint32_t>(min(row + 8 * i, N - 1)) * (K / 32) + 4 * first;
    offset[i] = groups * (4 * Bits) + c * (kPlain ? 16 : 4 * Bits);
    scale_offset[i] = (groups + c) * 2;
  }
  auto load_piece = [&](int i, int piece, int chunk) {  // zeros past the end, as there x is
    const unsigned char* p =
        static_cast<const unsigned char*>(weight) + offset[i] + (chunk - first) * (16 * Bits) +
        piece * kPieceStep;
    return 4 * chunk + (kPlain ? piece : c) >= K / 32 ? make_uint4(0, 0, 0, 0)
           : Bits == 4                                 ? load_streaming(p)
                                                       : load_streaming_ahead(p);
  };
  auto load_scale = [&](int i, int chunk) {
    const uint16_t bits =
        !kPlain && 4 * chunk + c < K / 32
            ? load_constant_16(static_cast<const unsigned char*>(scales) + scale_offset[i] +
                               (chunk - first) * 8)
            : uint16_t{0};
    return *reinterpret_cast<const Half*>(&bits);
  };

  // Codes come a chunk ahead into `next`; plain weights, of more registers, into the place of those
  // that are done with.
  constexpr bool kInPlace = kPlain;
  constexpr int kPieceSteps = 8 / kPieces;
  LaneWeights<Bits> now[2], next[2];
  Half scale[2], next_scale[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece)
      (kInPlace ? now : next)[i].pieces[piece] = load_piece(i, piece, first);
    next_scale[i] = load_scale(i, first);
  }
  float sum[Columns / 2];
#pragma unroll
  for (int i = 0; i < Columns / 2; ++i) sum[i] = 0.0f;
  uint32_t a[2][4];
  const uint64_t descriptor = wgmma_descriptor(stages);
  int stage = 0, phase = 0;
  for (int chunk = first; chunk < last; ++chunk) {
    const bool more = chunk + 1 < last;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!kInPlace) now[i] = next[i];
      scale[i] = next_scale[i];
      if (more) {
        next_scale[i] = load_scale(i, chunk + 1);
#pragma unroll
        for (int piece = 0; piece < kPieces; ++piece)
          if (!kInPlace) next[i].pieces[piece] = load_piece(i, piece, chunk + 1);
      }
    }
#pragma unroll
    for (int t = 0; t < 8; ++t) {
      uint32_t(&fragment)[4] = a[t % 2];
      expand(now[0], t, scale[0], fragment[0], fragment[2]);
      expand(now[1], t, scale[1], fragment[1], fragment[3]);
      if (kInPlace && t % kPieceSteps == kPieceSteps - 1 && more) {
#pragma unroll
        for (int i = 0; i < 2; ++i)
          now[i].pieces[t / kPieceSteps] = load_piece(i, t / kPieceSteps, chunk + 1);
      }
      if (t % 4 == 0) barrier_wait(&full[stage], phase);
      wgmma_fence();
      wgmma_m64k16(sum, fragment, descriptor + stage * (kTileBytes / 16) + 2 * (t % 4), Half());
      wgmma_commit();
      if (t % 4 == 1 && threadIdx.x == 0) {
        // The tile before the previous one makes room.
        const int step = 2 * (chunk - first) + t / 4 - 2;
        if (step >= 0 && step + Stages < steps) {
          const int free = stage >= 2 ? stage - 2 : stage - 2 + Stages;
          barrier_wait(&empty[free], stage >= 2 ? phase : phase ^ 1);
          fetch(step + Stages, free);
        }
      }
      wgmma_wait<1>();
      wgmma_hold(a[(t + 1) % 2]);
      if (t % 4 == 0 && (t > 0 || chunk > first)) {
        __syncwarp();
        if (lane == 0) barrier_arrive(&empty[stage > 0 ? stage - 1 : Stages - 1]);
      }
      if (t % 4 == 3 && ++stage == Stages) stage = 0, phase ^= 1;
    }
  }
  wgmma_wait<0>();
  wgmma_hold(sum);

  const int first_column = blockIdx.x * Columns;
  const bool split = chunks < all_chunks;
  Out* out = static_cast<Out*>(result) + (split ? static_cast<size_t>(blockIdx.z) * n * N : 0);
  if (Bias && !split) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float b = static_cast<float>(static_cast<const Half*>(bias)[min(row + 8 * i, N - 1)]);
#pragma unroll
      for (int j = 0; j < Columns / 8; ++j) sum[4 * j + 2 * i] += b, sum[4 * j + 2 * i + 1] += b;
    }
  }
  if (Residual && !split) {
#pragma unroll
    for (int j = 0; j < Columns / 2; ++j) {
      const int column = first_column + j / 4 * 8 + 2 * c + j % 2, r = row + j % 4 / 2 * 8;
      if (column < n && r < N)
        sum[j] += static_cast<float>(
            static_cast<const Out*>(residual)[static_cast<size_t>(column) * N + r]);
    }
  }
  if constexpr (sizeof(Out) == 4) {
#pragma unroll
    for (int j = 0; j < Columns / 2; ++j) {
      const int column = first_column + j / 4 * 8 + 2 * c + j % 2, r = row + j % 4 / 2 * 8;
      if (column < n && r < N) out[static_cast<size_t>(column) * N + r] = sum[j];
    }
  } else {
    Out* staging = reinterpret_cast<Out*>(stages + Stages * kTileBytes) +
                   group * (Columns * kStagingRow);
    Out* target = staging + (lane / 16 * 8 + lane % 8) * kStagingRow + 16 * (warp % 4) +
                  lane / 8 % 2 * 8;
#pragma unroll
    for (int j = 0; j < Columns / 8; j += 2) {
      uint32_t v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        v[i] = as_bits(round_pair(sum[4 * j + 2 * i], sum[4 * j + 2 * i + 1], Out()));
      store_matrix_x4_trans(target + 8 * j * kStagingRow, v[0], v[1], v[2], v[3]);
    }
    named_barrier(1 + group, 128);
    const int rows = min(n - first_column, Columns), width = min(N - tile_row, 64);
    if (N % 8 == 0) {
      const int piece = threadIdx.x % 8;
      if (8 * piece < width) {
        for (int r = threadIdx.x % 128 / 8; r < rows; r += 16)
          *reinterpret_cast<uint4*>(out + static_cast<size_t>(first_column + r) * N + tile_row +
                                    8 * piece) =
              *reinterpret_cast<const uint4*>(staging + r * kStagingRow + 8 * piece);
      }
    } else {
      const int element = threadIdx.x % 64;
      if (element < width) {
        for (int r = threadIdx.x % 128 / 64; r < rows; r += 2)
          out[static_cast<size_t>(first_column + r) * N + tile_row + element] =
              staging[r * kStagingRow + element];
      }
    }
  }
#endif
}

// out [n, N] = the sum of the `splits` parts [n, N] that gemm_sm90 wrote, plus bias and residual.
// One thread for 4 elements, 256 threads.
template <typename Half, typename Out, bool Bias, bool Residual>
__device__ __forceinline__ void sum_splits(const float* parts, const void* bias,
                                           const void* residual, void* out, int n, int N,
                                           int splits) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const size_t size = static_cast<size_t>(n) * N;
  const size_t first = (static_cast<size_t>(blockIdx.x) * 256 + threadIdx.x) * 4;
  if (first >= size) return;
  const int count = size - first < 4 ? static_cast<int>(size - first) : 4;
  float sum[4] = {};
  if (N % 4 == 0) {
    for (int s = 0; s < splits; ++s) {
      const float4 v = *reinterpret_cast<const float4*>(parts + s * size + first);
      sum[0] += v.x, sum[1] += v.y, sum[2] += v.z, sum[3] += v.w;
    }
  } else {
    for (int s = 0; s < splits; ++s)
      for (int i = 0; i < count; ++i) sum[i] += parts[s * size + first + i];
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (i < count) {
      if (Bias) sum[i] += static_cast<float>(static_cast<const Half*>(bias)[(first + i) % N]);
      if (Residual) sum[i] += static_cast<float>(static_cast<const Out*>(residual)[first + i]);
      static_cast<Out*>(out)[first + i] = Out(sum[i]);
    }
  }
#endif
}

}  // namespace mlc
