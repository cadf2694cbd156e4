// out = x W^T for 2..16 rows of x: every weight is read once, and that is what takes the time.
//
// A block owns 16 kTiles rows of the weight; its warps share K out in turns of 4 kSpan 16-byte units a
// row, so that lane (g, c) holds kSpan units of rows g and g + 8: both halves of its part of fragment
// A of the matrix units, which it dequantises in registers without any exchange between lanes. x is
// fragment B (8 rows, twice for more): each warp copies what its turn needs to shared memory, in the
// order in which a quad reads it, through L1, where the blocks of an SM find it again (from L2 alone
// it takes as long as the weights). A warp has one turn in flight and waits for no other; many warps
// hide it better than deeper pipelines of fewer. Their sums meet in shared memory.
#pragma once
#include "gemm_formats.cuh"

namespace mlc {

// ptx: 16 bytes to shared memory through L1, which the blocks of an SM share; zeros where !valid.
// Synchronous below sm_80.
__device__ __forceinline__ void copy_async_16_cached(void* shared, const void* global, bool valid) {
#if __CUDA_ARCH__ >= 800 && !defined(MLC_CUDA_EMULATOR)
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes)
               : "memory");
#else
  copy_async_16(shared, global, valid);
#endif
}

template <class Format, int kTiles, int kColumns, int kWarps, int kSpan, bool kBias, bool kResidual,
          bool kDependent, class O, class B>
__device__ __forceinline__ void gemm_rows_body(const void* x_at, const void* weight_at,
                                               const void* scale_at, const void* bias_at,
                                               const void* residual_at, void* out_at, int n,
                                               int rows, int k, unsigned char* shared) {
  using namespace gemm_format;
  using Element = typename Format::Element;
  const Element* x = static_cast<const Element*>(x_at);
  const uint4* weight = static_cast<const uint4*>(weight_at);
  const half* scale = static_cast<const half*>(scale_at);
  const B* bias = static_cast<const B*>(bias_at);
  const O* residual = static_cast<const O*>(residual_at);
  O* out = static_cast<O*>(out_at);
  constexpr int kPieces = 4 / Format::kPieceWords;  // of a unit
  constexpr int kVectors = Format::kUnit / 8;       // 16-byte vectors of x that meet a unit
  constexpr int kUnits = 4 * kSpan;                 // of a row in a turn
  constexpr int kGroupUnits = Format::kGroup ? Format::kGroup / Format::kUnit : 1;
  constexpr int kBlockRows = 16 * kTiles, kStride = kBlockRows + 4;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const int units = row_units<Format>(k), scales = row_scales<Format>(k);
  const int turns = (units + kUnits - 1) / kUnits;
  const bool whole_units = units % kUnits == 0, whole_rows = rows % kBlockRows == 0;
  const bool whole_x = whole_units && units * Format::kUnit == k;
  const int row0 = blockIdx.x * kBlockRows;

  float sums[kTiles][kColumns][4];
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
#pragma unroll
    for (int j = 0; j < kColumns; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[i][j][e] = 0.f;

  uint4 w[kTiles][2][kSpan];
  half s[kTiles][2][kSpan];

  // Where the warp's next turn begins. From there on, rows are a constant apart.
  const int first_row = whole_rows ? row0 + g : min(row0 + g, rows - 1);
  const uint4* next_weight =
      weight + static_cast<size_t>(first_row) * units + kUnits * warp + kSpan * c;
  const half* next_scale = scale + static_cast<size_t>(first_row) * scales;
  auto fetch_weights = [&](int turn) {
    const int unit = kUnits * turn + kSpan * c;
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        int beyond = 16 * i + 8 * h;
        if (!whole_rows) beyond = min(row0 + g + beyond, rows - 1) - first_row;
        const uint4* from = next_weight + static_cast<ptrdiff_t>(beyond) * units;
        const half* factors = next_scale + static_cast<ptrdiff_t>(beyond) * scales;
#pragma unroll
        for (int q = 0; q < kSpan; ++q) {
          w[i][h][q] = make_uint4(0, 0, 0, 0);
          s[i][h][q] = __ushort_as_half(0);
          if (whole_units || unit + q < units) {
            w[i][h][q] = load_streaming(from + q);
            if constexpr (Format::kGroup != 0)
              if (!(kSpan == 2 && kGroupUnits == 1 && whole_units && scales % 2 == 0))
                s[i][h][q] = __ldg(factors + (unit + q) / kGroupUnits);
          }
        }
        if constexpr (kSpan == 2 && Format::kGroup != 0 && kGroupUnits == 1)
          if (whole_units && scales % 2 == 0) {
            const half2 both = __ldg(reinterpret_cast<const half2*>(factors + unit));
            s[i][h][0] = __low2half(both), s[i][h][1] = __high2half(both);
          }
      }
    next_weight += kUnits * kWarps;
  };

  // [row of x][unit of a lane, vector of a unit][lane of a quad], of this warp; odd rows swap halves
  // of 128 bytes where else they would meet the even ones in the banks.
  constexpr int kXRow = kUnits * kVectors, kXSlot = 8 * kColumns * kXRow;
  constexpr int kXSwap = kXRow % 8 ? 0 : 4;
  uint4* x_slot = reinterpret_cast<uint4*>(shared) + warp * kXSlot;
  // Lanes take the pieces of whole rows where a row has a power of two of them.
  constexpr bool kWholeRows = 32 % kXRow == 0;
  const int line0 = lane / kXRow, piece0 = lane % kXRow;
  const Element* next_x = x + static_cast<size_t>(line0) * k + 8 * piece0 + warp * kUnits * Format::kUnit;
  auto fetch_x = [&](int turn) {
#pragma unroll
    for (int part = 0; part < kXSlot / 32; ++part) {
      const int i = 32 * part + lane;
      const int line = kWholeRows ? line0 + 32 / kXRow * part : i / kXRow;
      const int piece = kWholeRows ? piece0 : i % kXRow;
      const bool valid = line < n && (whole_x || turn * kUnits * Format::kUnit + 8 * piece < k);
      const int unit = piece / kVectors, vector = unit % kSpan * kVectors + piece % kVectors;
      const int to = (4 * vector + unit / kSpan) ^ (line % 2 * kXSwap);
      copy_async_16_cached(
          x_slot + line * kXRow + to,
          next_x + static_cast<ptrdiff_t>(line - line0) * k + 8 * (piece - piece0), valid);
    }
    copy_async_commit();
    next_x += kWarps * kUnits * Format::kUnit;
  };

  auto multiply = [&] {
#pragma unroll
    for (int q = 0; q < kSpan; ++q) {
      uint4 xv[kColumns][kVectors];
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
#pragma unroll
        for (int v = 0; v < kVectors; ++v)
          xv[j][v] = x_slot[(8 * j + g) * kXRow + ((4 * (q * kVectors + v) + c) ^ (g % 2 * kXSwap))];
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        uint32_t b[kColumns][Format::kPairs];
#pragma unroll
        for (int j = 0; j < kColumns; ++j)
          Format::arrange(
              reinterpret_cast<const uint32_t*>(&xv[j][0]) + piece * Format::kPairs, b[j]);
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          uint32_t a[2][Format::kPairs];
#pragma unroll
          for (int h = 0; h < 2; ++h)
            Format::unpack(
                reinterpret_cast<const uint32_t*>(&w[i][h][q]) + piece * Format::kPieceWords,
                __half2half2(s[i][h][q]), a[h]);
#pragma unroll
          for (int p = 0; p < Format::kPairs; p += 2)
#pragma unroll
            for (int j = 0; j < kColumns; ++j)
              mma_m16n8k16(sums[i][j], {a[0][p], a[1][p], a[0][p + 1], a[1][p + 1]},
                           {b[j][p], b[j][p + 1]}, Element());
        }
      }
    }
  };

  if (warp < turns) fetch_weights(warp);
  if constexpr (kDependent) {
    grid_dependency_launch();
    grid_dependency_wait();
  }
  if (warp < turns) fetch_x(warp);
  for (int turn = warp; turn < turns; turn += kWarps) {
    copy_async_wait<0>();
    __syncwarp();
    multiply();
    __syncwarp();
    if (turn + kWarps < turns) {
      fetch_weights(turn + kWarps);
      fetch_x(turn + kWarps);
    }
  }
  __syncthreads();

  // [warp][row of x][row of the weight], rows of x kStride apart: no two lanes meet in a bank.
  float* parts = reinterpret_cast<float*>(shared);
  constexpr int kPart = 8 * kColumns * kStride;
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
#pragma unroll
    for (int j = 0; j < kColumns; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        parts[warp * kPart + (8 * j + 2 * c + e % 2) * kStride + 16 * i + g + e / 2 * 8] =
            sums[i][j][e];
  __syncthreads();
  for (int i = threadIdx.x; i < 8 * kColumns * kBlockRows; i += 32 * kWarps) {
    const int column = i / kBlockRows, row = i % kBlockRows, to = row0 + row;
    if (column >= n || to >= rows) continue;
    float sum = 0.f;
#pragma unroll
    for (int from = 0; from < kWarps; ++from) sum += parts[from * kPart + column * kStride + row];
    const size_t at = static_cast<size_t>(column) * rows + to;
    if constexpr (kBias) sum += to_float(bias[to]);
    if constexpr (kResidual) sum += to_float(settled(residual)[at]);
    out[at] = from_float<O>(sum);
  }
}

// Dynamic shared memory, in bytes: of x, and then of the sums.
template <class Format, int kTiles, int kColumns, int kWarps, int kSpan>
constexpr int gemm_rows_shared() {
  const int x = kWarps * 8 * kColumns * kSpan * (Format::kUnit / 2) * 16;
  const int sums = kWarps * 8 * kColumns * (16 * kTiles + 4) * 4;
  return x > sums ? x : sums;
}

// O, B: the types of the output (and the residual) and of the bias.
template <class Format, int kTiles, int kColumns, int kWarps, int kSpan, bool kBias, bool kResidual,
          class O, class B>
__device__ __forceinline__ void gemm_rows(const void* x, const void* weight, const void* scale,
                                          const void* bias, const void* residual, void* out, int n,
                                          int rows, int k, unsigned char* shared) {
  gemm_rows_body<Format, kTiles, kColumns, kWarps, kSpan, kBias, kResidual, false, O, B>(
      x, weight, scale, bias, residual, out, n, rows, k, shared);
}

template <class Format, int kTiles, int kColumns, int kWarps, int kSpan, bool kBias, bool kResidual,
          class O, class B>
__device__ __forceinline__ void gemm_rows_dependent(const void* x, const void* weight, const void* scale,
                                                    const void* bias, const void* residual, void* out, int n,
                                                    int rows, int k, unsigned char* shared) {
  gemm_rows_body<Format, kTiles, kColumns, kWarps, kSpan, kBias, kResidual, true, O, B>(
      x, weight, scale, bias, residual, out, n, rows, k, shared);
}

}  // namespace mlc
