// out = x W^T for any number of rows of x, with mma.sync: prefill on cards without wgmma, and a few
// dozen rows everywhere.
//
// out^T = W x^T: a block computes kBlockM rows of the weight by kBlockN rows of x, a warp kWarpM by
// kWarpN of them, 64 elements of k (80 for three bits) in a turn. Packed words and x come to shared
// memory in a pipeline of asynchronous copies; a lane (g, c) reads the quarter c of a row's 64 k,
// words or halves, and dequantises in registers into its part of fragment A (see gemm_formats.cuh).
// With kWarpK > 1 the warps of a block also share k out, and their sums meet in shared memory.
//
// Any n, N, and K a multiple of 8: x is zero beyond its last row and beyond K, weight rows beyond the
// last repeat it.
#pragma once
#include "gemm_formats.cuh"

namespace mlc {

// Copies kRows x kPerRow pieces of 16 bytes to shared memory. A thread's pieces lie a constant number
// of rows apart wherever kPerRow divides the threads: source(row, piece, valid&) and
// target(row, piece) then cost little but their first call.
template <int kRows, int kPerRow, int kThreads, class Source, class Target>
__device__ __forceinline__ void copy_gemm_pieces(Source source, Target target) {
  constexpr int kCount = kRows * kPerRow, kTurns = (kCount + kThreads - 1) / kThreads;
  constexpr bool kApart = kThreads % kPerRow == 0;
  const int row0 = threadIdx.x / kPerRow, piece0 = threadIdx.x % kPerRow;
  auto row_of = [&](int turn) {
    return kApart ? row0 + turn * (kThreads / kPerRow)
                  : static_cast<int>(threadIdx.x + turn * kThreads) / kPerRow;
  };
  auto piece_of = [&](int turn) {
    return kApart ? piece0 : static_cast<int>(threadIdx.x + turn * kThreads) % kPerRow;
  };
  auto beyond = [&](int turn) {
    return kCount % kThreads != 0 && static_cast<int>(threadIdx.x) + turn * kThreads >= kCount;
  };
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    if (beyond(turn)) break;
    bool valid = true;
    const void* from = source(row_of(turn), piece_of(turn), valid);
    copy_async_16(target(row_of(turn), piece_of(turn)), from, valid);
  }
#else  // all loads first: they wait together
  uint4 pieces[kTurns];
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    pieces[turn] = make_uint4(0, 0, 0, 0);
    if (beyond(turn)) break;
    bool valid = true;
    const void* from = source(row_of(turn), piece_of(turn), valid);
    if (valid) pieces[turn] = __ldg(static_cast<const uint4*>(from));
  }
#pragma unroll
  for (int turn = 0; turn < kTurns; ++turn) {
    if (beyond(turn)) break;
    *static_cast<uint4*>(target(row_of(turn), piece_of(turn))) = pieces[turn];
  }
#endif
}

template <class Format, int kBlockM, int kBlockN, int kWarpM, int kWarpN, int kWarpK, int kStages>
struct GemmMmaShape {
  static constexpr int kLanePairs = Format::kUnit == 40 ? 10 : 8;  // of a row in a turn
  static constexpr int kDepth = 8 * kLanePairs;                    // k of a turn
  static constexpr int kPieces = kLanePairs / Format::kPairs;
  static constexpr int kWarps = kBlockM / kWarpM * (kBlockN / kWarpN) * kWarpK;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kXVectors = kDepth / 8;               // 16-byte pieces of a row in a turn
  static constexpr int kWVectors = kDepth / Format::kUnit;
  static constexpr int kXBytes = kBlockN * kXVectors * 16, kWBytes = kBlockM * kWVectors * 16;
  static constexpr int kStageBytes = kWarpK * (kXBytes + kWBytes);
  // Scales come eight groups at a time, which is four turns of one warp.
  static constexpr int kScaleStages = 4 / kWarpK;
  static constexpr int kScaleSlots = (kStages - 1 + kScaleStages - 1) / kScaleStages + 1;
  static constexpr int kScaleBytes = Format::kGroup ? kScaleSlots * kBlockM * 16 : 0;
  // The sums leave through shared memory, 16 rows of x of a warp at a time.
  static constexpr int kOutBytes = kWarps * 16 * (kWarpM + 4) * 4;
  static constexpr int kPartBytes = (kWarpK - 1) * kBlockM * kBlockN * 4;
  static constexpr int max3(int a, int b, int c) { return a > b ? (a > c ? a : c) : b > c ? b : c; }
  static constexpr int kSharedBytes =
      max3(kStages * kStageBytes + kScaleBytes, kOutBytes, kPartBytes);
};

template <class Format, int kBlockM, int kBlockN, int kWarpM, int kWarpN, int kWarpK, int kStages,
          bool kBias, bool kResidual, class O, class B>
__device__ __forceinline__ void gemm_mma(const void* x_at, const void* weight_at,
                                         const void* scale_at, const void* bias_at,
                                         const void* residual_at, void* out_at, int n, int rows,
                                         int k, unsigned char* shared) {
  using namespace gemm_format;
  using Shape = GemmMmaShape<Format, kBlockM, kBlockN, kWarpM, kWarpN, kWarpK, kStages>;
  using Element = typename Format::Element;
  const Element* x = static_cast<const Element*>(x_at);
  const uint4* weight = static_cast<const uint4*>(weight_at);
  const half* scale = static_cast<const half*>(scale_at);
  const B* bias = static_cast<const B*>(bias_at);
  const O* residual = static_cast<const O*>(residual_at);
  O* out = static_cast<O*>(out_at);
  constexpr int kThreads = Shape::kThreads, kDepth = Shape::kDepth, kPairs = Format::kPairs;
  constexpr int kXVectors = Shape::kXVectors, kWVectors = Shape::kWVectors;
  constexpr int kTilesM = kWarpM / 16, kTilesN = kWarpN / 8;
  constexpr bool kScaled = Format::kGroup != 0;
  // Neighbouring rows would meet in the banks where a row is 128 bytes: odd ones swap their pieces.
  constexpr int kXSwap = kXVectors == 8, kWSwap = kWVectors == 8;
  static_assert(kBlockM % kWarpM == 0 && kBlockN % kWarpN == 0 && kWarpN % 16 == 0, "tiles");

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const int warp_m = warp % (kBlockM / kWarpM) * kWarpM;
  const int warp_n = warp / (kBlockM / kWarpM) % (kBlockN / kWarpN) * kWarpN;
  const int warp_k = warp / (kBlockM / kWarpM * (kBlockN / kWarpN));
  const int column0 = blockIdx.x * kBlockN, row0 = blockIdx.y * kBlockM;
  const int units = row_units<Format>(k), scales = row_scales<Format>(k);
  const int turns = (k + kDepth * kWarpK - 1) / (kDepth * kWarpK);
  unsigned char* scale_slots = shared + kStages * Shape::kStageBytes;
  constexpr int kScaleStages = Shape::kScaleStages;
  auto scale_slot = [&](int turn) {  // of the eight groups that a turn is among
    return scale_slots + turn / kScaleStages % Shape::kScaleSlots * (kBlockM * 16);
  };

  auto fetch = [&](int turn) {
    unsigned char* x_stage = shared + turn % kStages * Shape::kStageBytes;
    unsigned char* w_stage = x_stage + kWarpK * Shape::kXBytes;
    const int k0 = turn * kDepth * kWarpK, unit0 = turn * kWarpK * kWVectors;
    const Element* x_from = x + static_cast<size_t>(column0) * k + k0;
    copy_gemm_pieces<kBlockN, kWarpK * kXVectors, kThreads>(
        [&](int row, int piece, bool& valid) -> const void* {
          valid = column0 + row < n && (k % (kDepth * kWarpK) == 0 || k0 + 8 * piece < k);
          return x_from + static_cast<ptrdiff_t>(row) * k + 8 * piece;
        },
        [&](int row, int piece) -> void* {
          const int part = piece / kXVectors, at = piece % kXVectors ^ (kXSwap & row);
          return x_stage + part * Shape::kXBytes + (row * kXVectors + at) * 16;
        });
    const uint4* w_from = weight + static_cast<size_t>(row0) * units + unit0;
    copy_gemm_pieces<kBlockM, kWarpK * kWVectors, kThreads>(
        [&](int row, int piece, bool& valid) -> const void* {
          if (rows % kBlockM != 0) row = min(row, rows - 1 - row0);
          valid = units % (kWarpK * kWVectors) == 0 || unit0 + piece < units;
          return w_from + static_cast<ptrdiff_t>(row) * units + piece;
        },
        [&](int row, int piece) -> void* {
          const int part = piece / kWVectors, at = piece % kWVectors ^ (kWSwap & row);
          return w_stage + part * Shape::kWBytes + (row * kWVectors + at) * 16;
        });
    if constexpr (kScaled) {
      if (turn % kScaleStages == 0) {
        const int first = 8 * (turn / kScaleStages);
        unsigned char* slot = scale_slot(turn);
        if (scales % 8 == 0) {
          copy_gemm_pieces<kBlockM, 1, kThreads>(
              [&](int row, int, bool&) -> const void* {
                return scale + static_cast<size_t>(min(row0 + row, rows - 1)) * scales + first;
              },
              [&](int row, int) -> void* { return slot + 16 * row; });
        } else {
          for (int i = threadIdx.x; i < kBlockM; i += kThreads) {
            const half* from = scale + static_cast<size_t>(min(row0 + i, rows - 1)) * scales;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
              reinterpret_cast<half*>(slot)[8 * i + j] = from[min(first + j, scales - 1)];
            }
          }
        }
      }
    }
  };

  float sums[kTilesM][kTilesN][4];
#pragma unroll
  for (int i = 0; i < kTilesM; ++i)
#pragma unroll
    for (int j = 0; j < kTilesN; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[i][j][e] = 0.f;

  auto multiply = [&](int turn) {
    const unsigned char* x_stage =
        shared + turn % kStages * Shape::kStageBytes + warp_k * Shape::kXBytes;
    const unsigned char* w_stage = shared + turn % kStages * Shape::kStageBytes +
                                   kWarpK * Shape::kXBytes + warp_k * Shape::kWBytes;
    half2 factors[kTilesM][2];
    if constexpr (kScaled) {
      const half* slot = reinterpret_cast<const half*>(scale_slot(turn));
      const int group = (turn % kScaleStages * kWarpK + warp_k) * 2 + c / 2;
#pragma unroll
      for (int i = 0; i < kTilesM; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          factors[i][h] = __half2half2(slot[(warp_m + 16 * i + 8 * h + g) * 8 + group]);
    }
    // The words of a lane in a turn where they are few; else piece by piece.
    constexpr int kWords = 4 * kWVectors / 4;
    constexpr bool kAtOnce = kWords == 2;
    uint2 both[kTilesM][2];
    if constexpr (kAtOnce) {
#pragma unroll
      for (int i = 0; i < kTilesM; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h)
          both[i][h] = *reinterpret_cast<const uint2*>(
              w_stage + (warp_m + 16 * i + 8 * h + g) * (kWVectors * 16) + 8 * c);
    }
#pragma unroll
    for (int piece = 0; piece < Shape::kPieces; ++piece) {
      uint32_t b[kTilesN][kPairs];
#pragma unroll
      for (int j = 0; j < kTilesN; ++j) {
        const int row = warp_n + 8 * j + g;
        uint32_t raw[kPairs];
        if constexpr (kPairs == 4) {
          const int at = (2 * c + piece) ^ (kXSwap & row);
          const uint4 v = *reinterpret_cast<const uint4*>(x_stage + (row * kXVectors + at) * 16);
          raw[0] = v.x, raw[1] = v.y, raw[2] = v.z, raw[3] = v.w;
        } else {
#pragma unroll
          for (int v = 0; v < kPairs / 2; ++v) {
            const uint2 two = *reinterpret_cast<const uint2*>(x_stage + row * (kXVectors * 16) +
                                                              4 * kPairs * c + 8 * v);
            raw[2 * v] = two.x, raw[2 * v + 1] = two.y;
          }
        }
        Format::arrange(raw, b[j]);
      }
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) {
        uint32_t a[2][kPairs];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int row = warp_m + 16 * i + 8 * h + g;
          uint32_t words[4];
          if constexpr (kAtOnce) {
            words[0] = Shape::kPieces == 1 || piece == 0 ? both[i][h].x : both[i][h].y;
            words[1] = both[i][h].y;
          } else if constexpr (kWords == 4) {
            const uint2 v = *reinterpret_cast<const uint2*>(w_stage + row * (kWVectors * 16) +
                                                            16 * c + 8 * piece);
            words[0] = v.x, words[1] = v.y;
          } else {
            const int at = (2 * c + piece) ^ (kWSwap & row);
            const uint4 v =
                *reinterpret_cast<const uint4*>(w_stage + (row * kWVectors + at) * 16);
            words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
          }
          Format::unpack(words, factors[i][h], a[h]);
        }
#pragma unroll
        for (int p = 0; p < kPairs; p += 2)
#pragma unroll
          for (int j = 0; j < kTilesN; ++j)
            mma_m16n8k16(sums[i][j], {a[0][p], a[1][p], a[0][p + 1], a[1][p + 1]},
                         {b[j][p], b[j][p + 1]}, Element());
      }
    }
  };

#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < turns) fetch(s);
    copy_async_commit();
  }
  for (int turn = 0; turn < turns; ++turn) {
    copy_async_wait<kStages - 2>();
    __syncthreads();
    if (turn + kStages - 1 < turns) fetch(turn + kStages - 1);
    copy_async_commit();
    multiply(turn);
  }
  copy_async_wait<0>();
  __syncthreads();

  if constexpr (kWarpK > 1) {
    constexpr int kOthers = kThreads / kWarpK;
    float4* parts = reinterpret_cast<float4*>(shared);
    const int mine = threadIdx.x % kOthers;
    if (warp_k > 0) {
#pragma unroll
      for (int i = 0; i < kTilesM; ++i)
#pragma unroll
        for (int j = 0; j < kTilesN; ++j)
          parts[((warp_k - 1) * kTilesM * kTilesN + i * kTilesN + j) * kOthers + mine] =
              make_float4(sums[i][j][0], sums[i][j][1], sums[i][j][2], sums[i][j][3]);
    }
    __syncthreads();
    if (warp_k == 0) {
#pragma unroll
      for (int from = 0; from < kWarpK - 1; ++from)
#pragma unroll
        for (int i = 0; i < kTilesM; ++i)
#pragma unroll
          for (int j = 0; j < kTilesN; ++j) {
            const float4 v = parts[(from * kTilesM * kTilesN + i * kTilesN + j) * kOthers + mine];
            sums[i][j][0] += v.x, sums[i][j][1] += v.y, sums[i][j][2] += v.z, sums[i][j][3] += v.w;
          }
    }
    __syncthreads();
    if (warp_k > 0) return;
  }

  constexpr int kStride = kWarpM + 4;  // so that no two lanes meet in a bank
  float* mine = reinterpret_cast<float*>(shared) + warp * 16 * kStride;
  constexpr int kQuads = kWarpM / 4;
#pragma unroll
  for (int j = 0; j < kTilesN; j += 2) {
#pragma unroll
    for (int i = 0; i < kTilesM; ++i)
#pragma unroll
      for (int t = 0; t < 2; ++t)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          mine[(8 * t + 2 * c + e % 2) * kStride + 16 * i + g + e / 2 * 8] = sums[i][j + t][e];
    __syncwarp();
#pragma unroll
    for (int item = 0; item < 16 * kQuads / 32; ++item) {
      const int line = (item * 32 + lane) / kQuads, quad = (item * 32 + lane) % kQuads;
      const int column = column0 + warp_n + 8 * j + line, row = row0 + warp_m + 4 * quad;
      if (column < n && row < rows) {
        const float4 v = *reinterpret_cast<const float4*>(mine + line * kStride + 4 * quad);
        const size_t at = static_cast<size_t>(column) * rows + row;
        if (rows % 4 == 0) {
          store_quad<kBias, kResidual>(v, bias + (kBias ? row : 0), residual + (kResidual ? at : 0),
                                       out + at);
        } else {
          const float values[4] = {v.x, v.y, v.z, v.w};
          for (int e = 0; e < 4 && row + e < rows; ++e) {
            float sum = values[e];
            if constexpr (kBias) sum += to_float(bias[row + e]);
            if constexpr (kResidual) sum += to_float(residual[at + e]);
            out[at + e] = from_float<O>(sum);
          }
        }
      }
    }
    __syncwarp();
  }
}

}  // namespace mlc
