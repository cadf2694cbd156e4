// Attention of many rows: FlashAttention-2 (Dao 2023) on the matrix units, softmax in base 2.
//
// - A row is one query head of one token; the `Group` heads that share a KV head share a tile, so
//   that K and V are read once for all of them. A tile is 16 * RowBlocks rows for each warp.
// - The keys of a tile pass in blocks of `Keys`, causal blocks beyond the tile's last row are not
//   visited, and only blocks that end beyond what the tile's first row sees are masked.
// - V of a block is copied while the block's scores are computed, K of the next one during softmax
//   and the product with V. Rows in shared memory are one chunk of 16 bytes longer than the head,
//   an odd number of chunks, so that eight rows' chunks lie in different banks.
// - Probabilities are rounded to T before the product with V, their sum is not rounded.
// - Heavy tiles (the last rows of a sequence) start first.
#pragma once
#include <stdint.h>

#include "attention_bounds.cuh"
#include "ptx.cuh"

namespace mlc {
namespace attention {

// The devices that a launch is for; machine code for others stays empty.
enum class Devices { All, Old, New, NewButHopper };  // old: below sm_80

__device__ __forceinline__ constexpr bool built_for(Devices devices) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  return devices == Devices::All || devices == Devices::Old;
#elif defined(__CUDA_ARCH_FEAT_SM90_ALL)
  return devices == Devices::All || devices == Devices::New;
#else
  return devices != Devices::Old;
#endif
}

constexpr int PageSize = 16;
// A masked score is -inf, the running maximum (in units of scores) starts at a finite number below
// any score, so that exp2 of their difference is 0 and never that of inf - inf.
constexpr float Lowest = -1e30f;

__device__ __forceinline__ uint32_t pack(float low, float high, half) {
  const half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}

__device__ __forceinline__ uint32_t pack(float low, float high, __nv_bfloat16) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}

// Over the four threads that hold a row of a fragment.
__device__ __forceinline__ float max_of_row(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

__device__ __forceinline__ float sum_of_row(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Where the keys and values of one sequence and head are: sixteen<Values>(key) is the row of `key`,
// a multiple of 16, and the 15 after it follow `Stride` elements apart.
template <typename T, int D, int KVHeads>
struct RaggedKeys {
  static constexpr int Stride = KVHeads * D;
  const T *keys, *values;  // the sequence's first rows of the head

  __device__ __forceinline__ void start(int) {}
  __device__ __forceinline__ void reach(int) {}
  template <bool Values>
  __device__ __forceinline__ const T* sixteen(int key) const {
    return (Values ? values : keys) + static_cast<int64_t>(key) * Stride;
  }
};

// Pages [2][kv head][16][d]. Each lane of a warp holds the number of one page out of 32, and that
// of the page 32 further on.
template <typename T, int D, int KVHeads>
struct PagedKeys {
  static constexpr int Stride = D;
  const T* first;    // the head's keys in page 0
  const int* table;  // the sequence's page numbers, of this lane on
  int count;         // how many there are of this lane on
  int pages, later;

  __device__ __forceinline__ int load(int page) const { return page < count ? table[page] : 0; }

  // Keys from `key` on will be asked for.
  __device__ __forceinline__ void start(int key) {
    const int page = key / (32 * PageSize) * 32;
    pages = load(page);
    later = load(page + 32);
  }

  // No key before `key`, a multiple of the block size, will be asked for from now on.
  __device__ __forceinline__ void reach(int key) {
    if (key % (32 * PageSize) == 0) {
      pages = later;
      later = load(key / PageSize + 32);
    }
  }

  // All lanes of a warp must call it.
  template <bool Values>
  __device__ __forceinline__ const T* sixteen(int key) const {
    const int page = __shfl_sync(0xffffffffu, pages, key / PageSize % 32);
    return first + static_cast<int64_t>(page) * (2 * KVHeads * PageSize * D) +
           (Values ? KVHeads * PageSize * D : 0);
  }
};

// Starts the copies of a block of rows from row `from` (a multiple of 16) on to shared memory, by
// `Threads` threads whose first has a multiple of that for its index. Zeros from `end` on: a slot
// that no key was written to may hold NaN, which no weight of 0 takes away. to(row, chunk): the
// place of 16 bytes.
template <bool Values, int D, int Keys, int Threads, int Unroll = Keys, class Source, class Place>
__device__ __forceinline__ void copy_block(const Source& source, int from, int end,
                                           const Place& to) {
  constexpr int Chunks = D / 8, Total = Keys * Chunks, Turn = Threads / Chunks;
  const int thread = threadIdx.x % Threads;
  if constexpr (Threads % Chunks == 0 && 16 % Turn == 0) {
    const int row = thread / Chunks, chunk = thread % Chunks;
    const int offset = row * Source::Stride + chunk * 8;
#pragma unroll Unroll
    for (int i = 0; i < Keys; i += 16) {
      const auto* at = source.template sixteen<Values>(from + i) + offset;
#pragma unroll
      for (int j = i; j < i + 16; j += Turn)
        copy_async_16(to(row + j, chunk), at + (j - i) * Source::Stride, from + row + j < end);
    }
  } else {
#pragma unroll
    for (int i = 0; i < Total; i += Threads) {
      const int n = i + thread, row = n / Chunks, chunk = n % Chunks;
      const auto* at = source.template sixteen<Values>((from + row) / 16 * 16);
      if (Total % Threads == 0 || n < Total)
        copy_async_16(to(row, chunk), at + row % 16 * Source::Stride + chunk * 8,
                      from + row < end);
    }
  }
}

// Two elements of an output row: float32 straight to memory, T through shared memory (`leave`), so
// that whole chunks go.
template <typename T>
__device__ __forceinline__ void put(T*, T* shared, int at, float a, float b, bool) {
  *reinterpret_cast<uint32_t*>(shared + at) = pack(a, b, T());
}

template <typename T>
__device__ __forceinline__ void put(float* row, T*, int at, float a, float b, bool inside) {
  if (inside) *reinterpret_cast<float2*>(row + at) = make_float2(a, b);
}

// A warp's rows, from row `first` of the sequence on, to memory.
template <int D, int Group, int Heads, int WarpRows, typename T>
__device__ __forceinline__ void leave(T* out, const T* shared, int first, int rows) {
  constexpr int Chunks = D / 8, Pitch = D + 8, Total = WarpRows * Chunks;
#pragma unroll
  for (int i = 0; i < Total; i += 32) {
    const int n = i + static_cast<int>(threadIdx.x) % 32, row = n / Chunks, chunk = n % Chunks;
    const int at = first + row;
    if ((Total % 32 == 0 || n < Total) && at < rows)
      *reinterpret_cast<uint4*>(out + static_cast<int64_t>(at / Group) * (Heads * D) +
                                at % Group * D + chunk * 8) =
          *reinterpret_cast<const uint4*>(shared + row * Pitch + chunk * 8);
  }
}

template <int D, int Group, int Heads, int WarpRows, typename T>
__device__ __forceinline__ void leave(float*, const T*, int, int) {}

// Which part of a tile's keys a block takes where several share the tile. The output of each is
// normalised and, in float32, merged with the others' by merge_parts.
struct Part {
  int index, count;
};

// The keys that rows `first` to `last` of a sequence see, those of one part, and how many keys all
// of these rows see. None of them sees a key before `start`, a multiple of Keys.
struct Range {
  int begin, end, unmasked;

  template <int Group, int Keys>
  __device__ __forceinline__ static Range of(int rows, int first, int last, int keys, bool causal,
                                             Part part, int start = 0) {
    const int ahead = keys - rows / Group;  // keys before the sequence's first token
    const int end = causal ? min(ahead + last / Group + 1, keys) : keys;
    const int unmasked = causal ? min(ahead + first / Group + 1, keys) : keys;
    const int share = (max(end - start, 0) + Keys * part.count - 1) / (Keys * part.count) * Keys;
    const int begin = start + share * part.index;
    return {begin, min(begin + share, end), unmasked};
  }
};

// The least and the greatest of low(token) for tokens `first` to `last`; all lanes of a warp.
template <class Bounds>
__device__ __forceinline__ int2 lows(const Bounds& bounds, int first, int last) {
  int least = 0x7fffffff, most = 0;
  for (int token = first + static_cast<int>(threadIdx.x) % 32; token <= last; token += 32) {
    const int low = bounds.low(token);
    least = min(least, low);
    most = max(most, low);
  }
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    least = min(least, __shfl_xor_sync(0xffffffffu, least, step));
    most = max(most, __shfl_xor_sync(0xffffffffu, most, step));
  }
  return make_int2(least, most);
}

// One tile of one KV head. q, out, lse: of the sequence's first token and the head's first query
// head; rows: tokens * Group; first: the tile's first row.
template <typename T, int D, int Group, int KVHeads, int Warps, int RowBlocks, int Keys,
          class Source, typename Out, class Bounds>
__device__ __forceinline__ void tile(const T* q, Source& source, Out* out, float* lse, int rows,
                                     int first, int key_count, bool causal, Part part,
                                     float scale, const Bounds& bounds, unsigned char* memory) {
  constexpr int Threads = 32 * Warps, WarpRows = 16 * RowBlocks, Rows = Warps * WarpRows;
  constexpr int Pitch = D + 8, Chunks = D / 8, Heads = Group * KVHeads;
  // A single row block keeps its queries in registers; they come through the memory of K and V.
  constexpr bool Through = RowBlocks == 1, Hold = RowBlocks * D <= 128 || Through;
  static_assert(D % 16 == 0 && Keys % 16 == 0 && (32 * PageSize) % Keys == 0, "block sizes");
  static_assert(!Through || Rows <= 2 * Keys, "queries pass through the memory of K and V");

  T* const shared = reinterpret_cast<T*>(memory);
  T* const shared_k = shared + (Through ? 0 : Rows * Pitch);
  T* const shared_v = shared_k + Keys * Pitch;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  T* const warp_q = shared + warp * WarpRows * Pitch;
  // The lane's row of 8x8 matrices: queries and values (16 rows, then the next 8 columns), keys.
  const int lane_qv = (lane % 16) * Pitch + lane / 16 * 8;
  const int lane_k = (lane / 16 * 8 + lane % 8) * Pitch + lane / 8 % 2 * 8;

  const auto place_k = [=](int row, int chunk) { return shared_k + row * Pitch + chunk * 8; };
  const auto place_v = [=](int row, int chunk) { return shared_v + row * Pitch + chunk * 8; };

  const int last = min(first + Rows, rows) - 1, ahead = key_count - rows / Group;
  int2 low = make_int2(0, 0);
  if constexpr (Bounds::Windowed) low = lows(bounds, first / Group, last / Group);
  const Range range = Range::of<Group, Keys>(rows, first, last, key_count, causal, part,
                                             low.x / Keys * Keys);

#pragma unroll
  for (int i = 0; i < Rows * Chunks; i += Threads) {
    const int n = i + thread, row = n / Chunks, chunk = n % Chunks;
    const int at = first + row;
    const T* from = q + static_cast<int64_t>(at / Group) * (Heads * D) + at % Group * D + chunk * 8;
    if (Rows * Chunks % Threads == 0 || n < Rows * Chunks)
      copy_async_16(shared + row * Pitch + chunk * 8, from, at < rows);
  }
  uint32_t held[Hold ? RowBlocks : 1][Hold ? D / 16 : 1][4];
  if (Through) {
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int k = 0; k < (Hold ? D / 16 : 0); ++k)
      load_matrix_x4(held[0][k], warp_q + k * 16 + lane_qv);
    __syncthreads();
  }
  source.start(range.begin);
  copy_block<false, D, Keys, Threads>(source, range.begin, range.end, place_k);
  copy_async_commit();
  if (Hold && !Through) {
    copy_async_wait<0>();
    __syncthreads();
#pragma unroll
    for (int m = 0; m < (Hold ? RowBlocks : 0); ++m)
#pragma unroll
      for (int k = 0; k < (Hold ? D / 16 : 0); ++k)
        load_matrix_x4(held[m][k], warp_q + m * 16 * Pitch + k * 16 + lane_qv);
  }

  float output[RowBlocks][D / 8][4];
  float top[RowBlocks][2], total[RowBlocks][2];
#pragma unroll
  for (int m = 0; m < RowBlocks; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) top[m][i] = Lowest, total[m][i] = 0;
#pragma unroll
    for (int u = 0; u < D / 8; ++u)
#pragma unroll
      for (int i = 0; i < 4; ++i) output[m][u][i] = 0;
  }

  for (int begin = range.begin; begin < range.end; begin += Keys) {
    copy_async_wait<0>();
    __syncthreads();  // K is there, and all have done with V
    copy_block<true, D, Keys, Threads>(source, begin, range.end, place_v);
    copy_async_commit();

    float score[RowBlocks][Keys / 8][4];
#pragma unroll
    for (int m = 0; m < RowBlocks; ++m)
#pragma unroll
      for (int j = 0; j < Keys / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) score[m][j][i] = 0;
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      uint32_t query[RowBlocks][4];
      if (!Hold) {
#pragma unroll
        for (int m = 0; m < RowBlocks; ++m)
          load_matrix_x4(query[m], warp_q + m * 16 * Pitch + k * 16 + lane_qv);
      }
#pragma unroll
      for (int j = 0; j < Keys / 16; ++j) {
        uint32_t key[4];
        load_matrix_x4(key, shared_k + j * 16 * Pitch + k * 16 + lane_k);
        const uint32_t low[2] = {key[0], key[1]}, high[2] = {key[2], key[3]};
#pragma unroll
        for (int m = 0; m < RowBlocks; ++m) {
          const uint32_t(&a)[4] = Hold ? held[Hold ? m : 0][Hold ? k : 0] : query[m];
          mma_m16n8k16(score[m][2 * j], a, low, T());
          mma_m16n8k16(score[m][2 * j + 1], a, high, T());
        }
      }
    }
    copy_async_wait<0>();
    __syncthreads();  // V is there, and all have done with K
    if (begin + Keys < range.end) {
      source.reach(begin + Keys);
      copy_block<false, D, Keys, Threads>(source, begin + Keys, range.end, place_k);
    }
    copy_async_commit();

    if constexpr (Bounds::Capped) {
#pragma unroll
      for (int m = 0; m < RowBlocks; ++m)
#pragma unroll
        for (int j = 0; j < Keys / 8; ++j)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            score[m][j][i] = tanh_approx(score[m][j][i] * bounds.inner);
    }
    if (Bounds::Windowed && begin < low.y) {
#pragma unroll
      for (int m = 0; m < RowBlocks; ++m)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = first + warp * WarpRows + m * 16 + i * 8 + lane / 4;
          const int limit = bounds.low(min(row, last) / Group) - begin - lane % 4 * 2;
#pragma unroll
          for (int j = 0; j < Keys / 8; ++j) {
            if (j * 8 < limit) score[m][j][2 * i] = -INFINITY;
            if (j * 8 + 1 < limit) score[m][j][2 * i + 1] = -INFINITY;
          }
        }
    }
    if (begin + Keys > range.unmasked) {
#pragma unroll
      for (int m = 0; m < RowBlocks; ++m)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = first + warp * WarpRows + m * 16 + i * 8 + lane / 4;
          const int end = causal ? min(ahead + row / Group + 1, key_count) : key_count;
          const int limit = end - begin - lane % 4 * 2;
#pragma unroll
          for (int j = 0; j < Keys / 8; ++j) {
            if (j * 8 >= limit) score[m][j][2 * i] = -INFINITY;
            if (j * 8 + 1 >= limit) score[m][j][2 * i + 1] = -INFINITY;
          }
        }
    }
#pragma unroll
    for (int m = 0; m < RowBlocks; ++m) {
      float shrink[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float best = score[m][0][2 * i];
#pragma unroll
        for (int j = 0; j < Keys / 8; ++j)
          best = fmaxf(best, fmaxf(score[m][j][2 * i], score[m][j][2 * i + 1]));
        best = fmaxf(top[m][i], max_of_row(best));
        shrink[i] = exp2_approx((top[m][i] - best) * scale);
        top[m][i] = best;
        const float offset = best * scale;
        float sum = 0;
#pragma unroll
        for (int j = 0; j < Keys / 8; ++j)
#pragma unroll
          for (int c = 2 * i; c < 2 * i + 2; ++c) {
            score[m][j][c] = exp2_approx(score[m][j][c] * scale - offset);
            sum += score[m][j][c];
          }
        total[m][i] = total[m][i] * shrink[i] + sum;
      }
      // Maxima change seldom after the first blocks.
      if (__any_sync(0xffffffffu, shrink[0] != 1 || shrink[1] != 1)) {
#pragma unroll
        for (int u = 0; u < D / 8; ++u)
#pragma unroll
          for (int i = 0; i < 4; ++i) output[m][u][i] *= shrink[i / 2];
      }
    }
#pragma unroll
    for (int j = 0; j < Keys / 16; ++j) {
      uint32_t weight[RowBlocks][4];
#pragma unroll
      for (int m = 0; m < RowBlocks; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float(&c)[4] = score[m][2 * j + i / 2];
          weight[m][i] = pack(c[i % 2 * 2], c[i % 2 * 2 + 1], T());
        }
#pragma unroll
      for (int u = 0; u < D / 16; ++u) {
        uint32_t value[4];
        load_matrix_x4_trans(value, shared_v + j * 16 * Pitch + u * 16 + lane_qv);
        const uint32_t low[2] = {value[0], value[1]}, high[2] = {value[2], value[3]};
#pragma unroll
        for (int m = 0; m < RowBlocks; ++m) {
          mma_m16n8k16(output[m][2 * u], weight[m], low, T());
          mma_m16n8k16(output[m][2 * u + 1], weight[m], high, T());
        }
      }
    }
  }

  // Through the warp's own rows of shared memory, so that whole chunks leave.
  copy_async_wait<0>();
  __syncthreads();  // all have done with V, or no block came and others' queries are there
#pragma unroll
  for (int m = 0; m < RowBlocks; ++m)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float sum = sum_of_row(total[m][i]);
      const float inverse = sum > 0 ? 1 / sum : 0;
      const int row = m * 16 + i * 8 + lane / 4;
      const int at = first + warp * WarpRows + row;
      const int64_t to = static_cast<int64_t>(at / Group) * Heads + at % Group;
#pragma unroll
      for (int u = 0; u < D / 8; ++u)
        put(out + to * D, warp_q + row * Pitch, u * 8 + lane % 4 * 2, output[m][u][2 * i] * inverse,
            output[m][u][2 * i + 1] * inverse, at < rows);
      if (lane % 4 == 0 && at < rows) lse[to] = sum > 0 ? top[m][i] * scale + log2f(sum) : Lowest;
    }
  __syncwarp();
  leave<D, Group, Heads, WarpRows>(out, warp_q, first + warp * WarpRows, rows);
}

template <typename T, typename Out>
__device__ __forceinline__ Part part_of() {
  if constexpr (sizeof(Out) == sizeof(T)) return {0, 1};
  return {static_cast<int>(blockIdx.y), static_cast<int>(gridDim.y)};
}

// Finds the block's tile of `Rows` rows and its KV head, and calls work(q, out, lse, rows, first,
// sequence, head) with what `tile` takes; not beyond the last tile. The grid is KVHeads times at
// least as many blocks as there are tiles (the host knows the number of tokens and of sequences).
template <int D, int Group, int KVHeads, int Rows, typename T, typename Out, class Work>
__device__ __forceinline__ void with_tile(const T* q, const int* q_ends, Out* out, float* lse,
                                          int batch, const Work& work) {
  int index = static_cast<int>(gridDim.x) / KVHeads - 1 - static_cast<int>(blockIdx.x) / KVHeads;
  const int head = blockIdx.x % KVHeads;
  for (int b = 0; b < batch; ++b) {
    const int rows = (q_ends[b + 1] - q_ends[b]) * Group;
    const int count = (rows + Rows - 1) / Rows;
    if (index < count) {
      const int64_t heads = static_cast<int64_t>(q_ends[b]) * (Group * KVHeads) + head * Group;
      return work(q + heads * D, out + heads * D, lse + heads, rows, index * Rows, b, head);
    }
    index -= count;
  }
}

// Keys and values [tokens, KVHeads, D] of this round: work(q, source, out, lse, rows, first, keys,
// sequence).
template <int D, int Group, int KVHeads, int Rows, typename T, class Work>
__device__ __forceinline__ void with_ragged_tile(const T* q, const int* q_ends, const T* k,
                                                 const T* v, const int* key_ends, T* out,
                                                 float* lse, int batch, const Work& work) {
  with_tile<D, Group, KVHeads, Rows>(
      q, q_ends, out, lse, batch,
      [&](const T* q, T* out, float* lse, int rows, int first, int b, int head) {
        const int key = key_ends[b], keys = key_ends[b + 1] - key;
        const int64_t at = (static_cast<int64_t>(key) * KVHeads + head) * D;
        RaggedKeys<T, D, KVHeads> source{k + at, v + at};
        work(q, source, out, lse, rows, first, keys, b);
      });
}

// Pages [2][KVHeads][16][D]; last_fill: the slots used in the last page of each sequence.
template <int D, int Group, int KVHeads, int Rows, typename T, typename Out, class Work>
__device__ __forceinline__ void with_paged_tile(const T* q, const int* q_ends, const T* pages,
                                                const int* page_ends, const int* page_table,
                                                const int* last_fill, Out* out, float* lse,
                                                int batch, const Work& work) {
  with_tile<D, Group, KVHeads, Rows>(
      q, q_ends, out, lse, batch,
      [&](const T* q, Out* out, float* lse, int rows, int first, int b, int head) {
        const int page = page_ends[b], count = page_ends[b + 1] - page;
        const int keys = count > 0 ? (count - 1) * PageSize + last_fill[b] : 0;
        const int lane = threadIdx.x % 32;
        PagedKeys<T, D, KVHeads> source{pages + head * (PageSize * D), page_table + page + lane,
                                        count - lane, 0, 0};
        work(q, source, out, lse, rows, first, keys, b);
      });
}

}  // namespace attention

// The kernels. scale: of scores in base 2. Shared memory: see attention_prefill.py.
template <typename T, int D, int Group, int KVHeads, int Warps, int RowBlocks, int Keys,
          attention::Devices For, class Bounds>
__device__ __forceinline__ void prefill_ragged_in(const Bounds& all, const T* q, const int* q_ends,
                                                  const T* k, const T* v, const int* key_ends,
                                                  T* out, float* lse, int batch, bool causal,
                                                  float scale, unsigned char* memory) {
  if constexpr (attention::built_for(For))
    attention::with_ragged_tile<D, Group, KVHeads, 16 * Warps * RowBlocks>(
        q, q_ends, k, v, key_ends, out, lse, batch,
        [&](const T* q, auto& source, T* out, float* lse, int rows, int first, int keys, int b) {
          attention::tile<T, D, Group, KVHeads, Warps, RowBlocks, Keys>(
              q, source, out, lse, rows, first, keys, causal, {0, 1}, scale,
              all.of(q_ends[b], b), memory);
        });
}

// Out is T, or float with a grid whose y is the number of parts; then out is
// [parts, count, D] and lse [parts, count], where count is all tokens times all query heads.
template <typename T, int D, int Group, int KVHeads, int Warps, int RowBlocks, int Keys,
          attention::Devices For, typename Out, class Bounds>
__device__ __forceinline__ void prefill_paged_in(const Bounds& all, const T* q, const int* q_ends,
                                                 const T* pages, const int* page_ends,
                                                 const int* page_table, const int* last_fill,
                                                 Out* out, float* lse, int count, int batch,
                                                 bool causal, float scale, unsigned char* memory) {
  if constexpr (attention::built_for(For)) {
    const attention::Part part = attention::part_of<T, Out>();
    const int64_t before = static_cast<int64_t>(part.index) * count;
    attention::with_paged_tile<D, Group, KVHeads, 16 * Warps * RowBlocks>(
        q, q_ends, pages, page_ends, page_table, last_fill, out + before * D, lse + before, batch,
        [&](const T* q, auto& source, Out* out, float* lse, int rows, int first, int keys, int b) {
          attention::tile<T, D, Group, KVHeads, Warps, RowBlocks, Keys>(
              q, source, out, lse, rows, first, keys, causal, part, scale, all.of(q_ends[b], b),
              memory);
        });
  }
}

template <typename T, int D, int Group, int KVHeads, int Warps, int RowBlocks, int Keys,
          attention::Devices For>
__device__ __forceinline__ void prefill_ragged(const T* q, const int* q_ends, const T* k,
                                               const T* v, const int* key_ends, T* out, float* lse,
                                               int batch, bool causal, float scale,
                                               unsigned char* memory) {
  prefill_ragged_in<T, D, Group, KVHeads, Warps, RowBlocks, Keys, For>(
      attention::Unbounded{}, q, q_ends, k, v, key_ends, out, lse, batch, causal, scale, memory);
}

template <typename T, int D, int Group, int KVHeads, int Warps, int RowBlocks, int Keys,
          attention::Devices For, typename Out>
__device__ __forceinline__ void prefill_paged(const T* q, const int* q_ends, const T* pages,
                                              const int* page_ends, const int* page_table,
                                              const int* last_fill, Out* out, float* lse,
                                              int count, int batch, bool causal, float scale,
                                              unsigned char* memory) {
  prefill_paged_in<T, D, Group, KVHeads, Warps, RowBlocks, Keys, For, Out>(
      attention::Unbounded{}, q, q_ends, pages, page_ends, page_table, last_fill, out, lse, count,
      batch, causal, scale, memory);
}

// The same with bounds on scores and keys: attention::Bounded.
template <bool Cap, bool Window, typename T, int D, int Group, int KVHeads, int Warps,
          int RowBlocks, int Keys, attention::Devices For>
__device__ __forceinline__ void bounded_prefill_ragged(
    float inner, const int* positions, const int* offsets, int window, const T* q,
    const int* q_ends, const T* k, const T* v, const int* key_ends, T* out, float* lse, int batch,
    bool causal, float scale, unsigned char* memory) {
  const attention::Bounded<Cap, Window> bounds{inner, positions, offsets, window};
  prefill_ragged_in<T, D, Group, KVHeads, Warps, RowBlocks, Keys, For>(
      bounds, q, q_ends, k, v, key_ends, out, lse, batch, causal, scale, memory);
}

template <bool Cap, bool Window, typename T, int D, int Group, int KVHeads, int Warps,
          int RowBlocks, int Keys, attention::Devices For, typename Out>
__device__ __forceinline__ void bounded_prefill_paged(
    float inner, const int* positions, const int* offsets, int window, const T* q,
    const int* q_ends, const T* pages, const int* page_ends, const int* page_table,
    const int* last_fill, Out* out, float* lse, int count, int batch, bool causal, float scale,
    unsigned char* memory) {
  const attention::Bounded<Cap, Window> bounds{inner, positions, offsets, window};
  prefill_paged_in<T, D, Group, KVHeads, Warps, RowBlocks, Keys, For, Out>(
      bounds, q, q_ends, pages, page_ends, page_table, last_fill, out, lse, count, batch, causal,
      scale, memory);
}

// out = the parts of each of `rows` rows by their weights; a warp for each row.
template <typename T, int D, int Warps>
__device__ __forceinline__ void merge_parts(const float* parts, const float* part_lse, T* out,
                                            float* lse, int rows, int count) {
  const int row = blockIdx.x * Warps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= rows) return;
  float top = attention::Lowest, total = 0;
  for (int i = 0; i < count; ++i) top = fmaxf(top, part_lse[static_cast<int64_t>(i) * rows + row]);
  constexpr int Pairs = (D / 2 + 31) / 32;
  float2 sum[Pairs];
#pragma unroll
  for (int u = 0; u < Pairs; ++u) sum[u] = make_float2(0, 0);
  for (int i = 0; i < count; ++i) {
    const int64_t at = static_cast<int64_t>(i) * rows + row;
    const float weight = exp2_approx(part_lse[at] - top);
    total += weight;
#pragma unroll
    for (int u = 0; u < Pairs; ++u)
      if (lane + 32 * u < D / 2) {
        const float2 x = reinterpret_cast<const float2*>(parts + at * D)[lane + 32 * u];
        sum[u].x += weight * x.x;
        sum[u].y += weight * x.y;
      }
  }
#pragma unroll
  for (int u = 0; u < Pairs; ++u)
    if (lane + 32 * u < D / 2)
      reinterpret_cast<uint32_t*>(out + static_cast<int64_t>(row) * D)[lane + 32 * u] =
          attention::pack(sum[u].x / total, sum[u].y / total, T());
  if (lane == 0) lse[row] = top > attention::Lowest ? top + log2f(total) : attention::Lowest;
}

}  // namespace mlc
