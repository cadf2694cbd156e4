// Attention of one row of each sequence to its cached pages, split over the sequence: the flash
// decoding of Dao, Haziza, Massa and Sizov, "Flash-Decoding for long-context inference" (2023).
//
// - A page is [2 (key, value)][kv head][16 slots][d]. The grid is (chunks, units): a chunk is
//   `chunk_pages` pages of one sequence, a unit the query heads (at most 8) that share a KV head.
//   A block finds its sequence in page_indptr; a sequence without keys has one chunk too.
// - A warp takes a page at a time straight into registers, 16 bytes a load, in the layout of a
//   matrix fragment: S^T = K q^T (16 keys x 8 heads) and O^T += V^T P^T. The order of the summed
//   dimensions and that of the output's is ours to choose, so nothing is moved but P.
// - float32 caches take the plain cores: their products would lose digits in the matrix units.
// - Softmax is online, in base 2, over float32. Chunks meet in a workspace; the block that arrives
//   last at its sequence's counter adds them up.
#pragma once
#include "attention_bounds.cuh"
#include "vector.cuh"

namespace mlc {

constexpr int kPageSlots = 16;
constexpr float kDecodeEmpty = -5e28f;     // running maximum before any key
constexpr float kDecodeMasked = -5e29f;    // score of a key behind the end: weighs exactly 0
constexpr float kDecodeSmallest = 1e-37f;  // stands for a sum of 0
constexpr int kDecodeCounters = 16384;

// Arrivals of the chunks of a sequence and unit, 0 between launches. Launches that overlap in time
// (on several streams) must not share it.
__device__ unsigned attention_decode_arrivals[kDecodeCounters];

// ptx: adds 1 and gives what was there. What the block wrote before its last barrier is then seen
// by whoever arrives later, and what earlier ones wrote, by the block behind its next barrier.
__device__ __forceinline__ unsigned arrive(unsigned* counter) {
#ifdef MLC_CUDA_EMULATOR
  __threadfence();
  return atomicAdd(counter, 1u);
#else
  unsigned before;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(counter)
               : "memory");
  return before;
#endif
}

template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack_pair<half>(float low, float high) {
  const half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ __forceinline__ uint32_t pack_pair<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

template <typename T>
__device__ __forceinline__ void store_four(T* to, const float4& v) {
  *reinterpret_cast<uint2*>(to) = make_uint2(pack_pair<T>(v.x, v.y), pack_pair<T>(v.z, v.w));
}
__device__ __forceinline__ void store_four(float* to, const float4& v) {
  *reinterpret_cast<float4*>(to) = v;
}

__device__ __forceinline__ void add_weighted(float4& sum, float weight, const float4& o) {
  sum.x = fmaf(weight, o.x, sum.x);
  sum.y = fmaf(weight, o.y, sum.y);
  sum.z = fmaf(weight, o.z, sum.z);
  sum.w = fmaf(weight, o.w, sum.w);
}

// What a block is to do.
struct DecodeWork {
  int sequence, chunk, chunks;
  int first;  // of its pages in page_indices
  int pages, keys;
  int low;  // the first key of the chunk that is seen, in its first page
  bool any;
};

__device__ __forceinline__ int pages_to_chunks(int pages, int chunk_pages) {
  const unsigned n = pages + chunk_pages - 1;
  return max(1, static_cast<int>(n / static_cast<unsigned>(chunk_pages)));
}

// The pages of a sequence that lie wholly before its window.
template <class Bounds>
__device__ __forceinline__ int hidden_pages(const Bounds& bounds, int sequence, int pages) {
  if constexpr (!Bounds::Windowed) return 0;
  return min(bounds.of(sequence, sequence).low(0) / kPageSlots, pages);
}

template <class Bounds>
__device__ __forceinline__ DecodeWork find_decode_work(const Bounds& bounds,
                                                       const int* page_indptr,
                                                       const int* length_info, int rows,
                                                       int chunk_pages) {
  DecodeWork w;
  w.any = true;
  w.sequence = 0;
  w.chunk = blockIdx.x;
  int begin = 0, count;
  if (rows == 1) {
    // The first sequence's pages begin at 0: one load less to wait for.
    count = page_indptr[1];
    begin = hidden_pages(bounds, 0, count);
    count -= begin;
    w.chunks = pages_to_chunks(count, chunk_pages);
    w.any = w.chunk < w.chunks;
  } else {
    const int lane = threadIdx.x % 32;
    int before = 0;
    w.any = false;
#pragma unroll 1
    for (int base = 0; base < rows && !w.any; base += 32) {
      const int i = base + lane;
      int from = i < rows ? page_indptr[i] : 0;
      int size = i < rows ? page_indptr[i + 1] - from : 0;
      if (Bounds::Windowed && i < rows) {
        const int hidden = hidden_pages(bounds, i, size);
        from += hidden;
        size -= hidden;
      }
      const int n = i < rows ? pages_to_chunks(size, chunk_pages) : 0;
      int sum = n;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, sum, step);
        if (lane >= step) sum += other;
      }
      const bool here = static_cast<int>(blockIdx.x) < before + sum;
      const unsigned found = __ballot_sync(0xffffffffu, here);
      if (found) {
        const int at = __ffs(found) - 1;
        w.any = true;
        w.sequence = base + at;
        w.chunks = __shfl_sync(0xffffffffu, n, at);
        w.chunk = blockIdx.x - (before + __shfl_sync(0xffffffffu, sum - n, at));
        begin = __shfl_sync(0xffffffffu, from, at);
        count = __shfl_sync(0xffffffffu, size, at);
      } else {
        before += __shfl_sync(0xffffffffu, sum, 31);
      }
    }
  }
  if (!w.any) return w;
  const int total = count > 0 ? (count - 1) * kPageSlots + length_info[w.sequence] : 0;
  w.first = begin + w.chunk * chunk_pages;
  w.pages = max(0, min(chunk_pages, count - w.chunk * chunk_pages));
  w.keys = max(0, min(w.pages * kPageSlots, total - w.chunk * chunk_pages * kPageSlots));
  w.low = 0;
  if (Bounds::Windowed && w.chunk == 0)
    w.low = bounds.of(w.sequence, w.sequence).low(0) % kPageSlots;
  return w;
}

// Shared memory of a block, and the end of its work: the warps' results become the block's, and the
// blocks' the sequence's.
template <int kDim, int kHeads, int kWarps>
struct DecodeMerge {
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kQuads = kHeads * kDim / 4;  // float4 of an output
  static constexpr int kGroups = kThreads / kQuads > 1 ? kThreads / kQuads : 1;
  static constexpr int kItems = kGroups * kQuads;
  // Floats of a partial result: the output, each head's maximum and sum.
  static constexpr int kPart = kHeads * kDim + (2 * kHeads + 3) / 4 * 4;
  static constexpr int kRound = 8;

  float4 output[kWarps * kQuads > kItems ? kWarps * kQuads : kItems];
  float2 state[kHeads * kWarps];  // [head][warp]: maximum, sum
  float2 states[kItems];
  int last;

  __device__ __forceinline__ void set(int warp, int head, float best, float all) {
    state[head * kWarps + warp] = make_float2(best, all);
  }

  template <typename T>
  static __device__ __forceinline__ void put(T* out, float* lse, int q, const float4& sum,
                                             float best, float all) {
    all = fmaxf(all, kDecodeSmallest);
    const float inverse = __fdividef(1.f, all);
    store_four(out + 4 * q, make_float4(sum.x * inverse, sum.y * inverse, sum.z * inverse,
                                        sum.w * inverse));
    if (q % (kDim / 4) == 0) lse[q / (kDim / 4)] = best + __log2f(all);
  }

  template <typename T>
  __device__ __forceinline__ void finish(const DecodeWork& w, T* out, float* lse, float* part,
                                         int heads) {
    const int tid = threadIdx.x;
    float* const mine =
        part + (static_cast<size_t>(blockIdx.x) * gridDim.y + blockIdx.y) * kPart;
    __syncthreads();
#pragma unroll 1
    for (int q = tid; q < kQuads; q += kThreads) {
      const int head = q / (kDim / 4);
      float best = kDecodeEmpty, all = 0;
      float2 seen[kWarps];
#pragma unroll
      for (int i = 0; i < kWarps; ++i) seen[i] = state[head * kWarps + i];
#pragma unroll
      for (int i = 0; i < kWarps; ++i) best = fmaxf(best, seen[i].x);
      float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
      for (int i = 0; i < kWarps; ++i) {
        const float weight = exp2_approx(seen[i].x - best);
        all = fmaf(weight, seen[i].y, all);
        add_weighted(sum, weight, output[i * kQuads + q]);
      }
      if (w.chunks == 1) {
        if (head < heads) put(out, lse, q, sum, best, all);
      } else {
        *reinterpret_cast<float4*>(mine + 4 * q) = sum;
        if (q % (kDim / 4) == 0)
          reinterpret_cast<float2*>(mine + kHeads * kDim)[head] = make_float2(best, all);
      }
    }
    if (w.chunks == 1) return;

    __syncthreads();
    if (tid == 0) {
      unsigned* const counter = attention_decode_arrivals + w.sequence * gridDim.y + blockIdx.y;
      last = arrive(counter) == static_cast<unsigned>(w.chunks - 1);
      if (last) *counter = 0;
    }
    __syncthreads();
    if (!last) return;

    // Thread (group, quad) adds up every kGroups-th chunk, several under way at a time.
    const unsigned stride = gridDim.y * kPart;  // all chunks of a sequence are within 32 bits
    const float* const first = mine - static_cast<size_t>(w.chunk) * stride;
#pragma unroll 1
    for (int item = tid; item < kItems; item += kThreads) {
      const int q = item % kQuads, head = q / (kDim / 4);
      float4 sum = make_float4(0, 0, 0, 0);
      float best = kDecodeEmpty, all = 0;
#pragma unroll 1
      for (int c0 = item / kQuads; c0 < w.chunks; c0 += kRound * kGroups) {
        float4 o[kRound];
        float2 seen[kRound];
#pragma unroll
        for (int i = 0; i < kRound; ++i) {
          const float* const at = first + min(c0 + i * kGroups, w.chunks - 1) * stride;
          seen[i] = __ldcg(reinterpret_cast<const float2*>(at + kHeads * kDim) + head);
          o[i] = __ldcg(reinterpret_cast<const float4*>(at) + q);
        }
        const float before = best;
#pragma unroll
        for (int i = 0; i < kRound; ++i) best = fmaxf(best, seen[i].x);
        const float shrink = exp2_approx(before - best);
        all *= shrink;
        sum = make_float4(sum.x * shrink, sum.y * shrink, sum.z * shrink, sum.w * shrink);
#pragma unroll
        for (int i = 0; i < kRound; ++i) {
          const float weight =
              c0 + i * kGroups < w.chunks ? exp2_approx(seen[i].x - best) : 0.f;
          all = fmaf(weight, seen[i].y, all);
          add_weighted(sum, weight, o[i]);
        }
      }
      if (kGroups == 1) {
        if (head < heads) put(out, lse, q, sum, best, all);
      } else {
        output[item] = sum;
        states[item] = make_float2(best, all);
      }
    }
    if (kGroups > 1) {
      __syncthreads();
      if (tid < kQuads && tid / (kDim / 4) < heads) {
        float best = kDecodeEmpty, all = 0;
        float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
        for (int i = 0; i < kGroups; ++i) best = fmaxf(best, states[i * kQuads + tid].x);
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
          const float weight = exp2_approx(states[i * kQuads + tid].x - best);
          all = fmaf(weight, states[i * kQuads + tid].y, all);
          add_weighted(sum, weight, output[i * kQuads + tid]);
        }
        put(out, lse, tid, sum, best, all);
      }
    }
  }
};

// Query heads of a unit and units of a KV head: as few units of at most `most` heads, alike. A
// fragment has 8 heads; long heads take much shared memory, float32 many registers.
__host__ __device__ constexpr int decode_most(int bytes, int dim) {
  return bytes == 4 ? (dim > 128 ? 2 : 4) : (dim > 128 ? 4 : 8);
}
__host__ __device__ constexpr int decode_units(int group, int most) {
  return (group + most - 1) / most;
}
__host__ __device__ constexpr int decode_heads(int group, int most) {
  return (group + decode_units(group, most) - 1) / decode_units(group, most);
}

// float16 and bfloat16: a warp has a page at a time. The next page's keys are under way while this
// one's values are used.
template <typename T, int kDim, int kKvHeads, int kGroup, int kWarps, class Bounds>
__device__ __forceinline__ void decode_matrix(const Bounds& bounds, const T* q, const T* pages,
                                              const int* page_indptr, const int* page_indices,
                                              const int* length_info, T* out, float* lse,
                                              float* part, int rows, int id_count,
                                              int chunk_pages, float sm_scale) {
#if __CUDA_ARCH__ >= 750
  constexpr int kMost = decode_most(2, kDim);
  constexpr int kUnits = decode_units(kGroup, kMost), kHeads = decode_heads(kGroup, kMost);
  constexpr int kSteps = kDim / 32;         // K: 16-byte pieces of a lane and key
  constexpr bool kRest = kDim % 32 != 0;    // and 8 bytes for the last 16 dimensions
  constexpr int kFull = kDim / 64;          // V: the same, 64 dimensions apart
  constexpr int kRegs = kDim / 16;          // V: registers of a key
  constexpr size_t kFar = static_cast<size_t>(kKvHeads) * kPageSlots * kDim;  // key to value
  static_assert(kDim % 16 == 0, "a fragment has 16 dimensions");
  __shared__ __align__(16) DecodeMerge<kDim, kHeads, kWarps> merge;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int kv = blockIdx.y / kUnits, first_head = (blockIdx.y % kUnits) * kHeads;
  const int heads = min(kHeads, kGroup - first_head);

  uint4 k[2][kSteps];
  uint2 k_rest[2];
  uint32_t v[4][kRegs];
  const T* keys = nullptr;
  const auto load_keys = [&](int page) {
    keys = pages + (static_cast<size_t>(page) * (2 * kKvHeads) + kv) * (kPageSlots * kDim);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const T* const from = keys + (g + 8 * j) * kDim;
#pragma unroll
      for (int s = 0; s < kSteps; ++s)
        k[j][s] = __ldg(reinterpret_cast<const uint4*>(from + 32 * s + 8 * t));
      if (kRest) k_rest[j] = __ldg(reinterpret_cast<const uint2*>(from + 32 * kSteps + 4 * t));
    }
  };
  const auto load_values = [&]() {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const T* const from = keys + kFar + (2 * t + (j & 1) + 4 * (j & 2)) * kDim;
#pragma unroll
      for (int c = 0; c < kFull; ++c) {
        const uint4 x = __ldg(reinterpret_cast<const uint4*>(from + 64 * c + 8 * g));
        v[j][4 * c] = x.x;
        v[j][4 * c + 1] = x.y;
        v[j][4 * c + 2] = x.z;
        v[j][4 * c + 3] = x.w;
      }
      if (kDim % 64 >= 32) {
        const uint2 x = __ldg(reinterpret_cast<const uint2*>(from + 64 * kFull + 4 * g));
        v[j][4 * kFull] = x.x;
        v[j][4 * kFull + 1] = x.y;
      }
      if (kDim % 32 == 16)
        v[j][kRegs - 1] = __ldg(reinterpret_cast<const uint32_t*>(from + (kDim - 16) + 2 * g));
    }
  };

  // A sequence alone: its pages are all that are listed, so that the first one's load need not wait
  // for the lengths; but for where a window begins.
  const bool alone = !Bounds::Windowed && rows == 1;
  const int guess = blockIdx.x * chunk_pages + warp + lane * kWarps;
  int index = 0;
  if (alone) {
    if (guess < id_count) index = page_indices[guess];
    if (warp < chunk_pages && guess - lane * kWarps < id_count) {
      load_keys(__shfl_sync(0xffffffffu, index, 0));
      load_values();
    }
  }
  const DecodeWork w = find_decode_work(bounds, page_indptr, length_info, rows, chunk_pages);
  if (!w.any) return;
  const size_t head_at = static_cast<size_t>(w.sequence) * (kKvHeads * kGroup) + kv * kGroup +
                         first_head;

  // q as the B fragments of a product over 32 dimensions: 8 of one head for a lane.
  uint4 query[kSteps];
  uint2 query_rest = make_uint2(0, 0);
#pragma unroll
  for (int s = 0; s < kSteps; ++s) query[s] = make_uint4(0, 0, 0, 0);
  if (g < heads) {
    const T* const from = q + (head_at + g) * kDim;
#pragma unroll
    for (int s = 0; s < kSteps; ++s)
      query[s] = *reinterpret_cast<const uint4*>(from + 32 * s + 8 * t);
    if (kRest) query_rest = *reinterpret_cast<const uint2*>(from + 32 * kSteps + 4 * t);
  }

  float output[kRegs][4];
#pragma unroll
  for (int r = 0; r < kRegs; ++r)
#pragma unroll
    for (int i = 0; i < 4; ++i) output[r][i] = 0;
  float top[2] = {kDecodeEmpty, kDecodeEmpty}, total[2] = {0, 0};  // heads 2 t and 2 t + 1
  const float scale = sm_scale * 1.4426950408889634f;

  // The i-th page of this warp.
  const auto page_of = [&](int i) {
    if (i % 32 == 0 && !(alone && i == 0)) {
      const int mine = warp + (i + lane) * kWarps;
      index = mine < w.pages ? page_indices[w.first + mine] : 0;
    }
    return __shfl_sync(0xffffffffu, index, i % 32);
  };

  if (!alone && warp < w.pages) load_keys(page_of(0));
#pragma unroll 1
  for (int n = warp, i = 0; n < w.pages; n += kWarps, ++i) {
    const int seen = w.keys - n * kPageSlots;  // keys of this page, if less than 16
    if (i > 0 || !alone) load_values();
    if (seen < kPageSlots) {
      // What no key has written may be anything, and 0 times that too.
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int r = 0; r < kRegs; ++r)
          if (2 * t + (j & 1) + 4 * (j & 2) >= seen) v[j][r] = 0;
    }

    // s: keys g and g + 8, heads 2 t and 2 t + 1
    float s[4] = {0, 0, 0, 0}, other[4] = {0, 0, 0, 0};  // two sums wait less for each other
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint32_t a0[4] = {k[0][step].x, k[1][step].x, k[0][step].y, k[1][step].y};
      const uint32_t b0[2] = {query[step].x, query[step].y};
      mma_m16n8k16(s, a0, b0, T());
      const uint32_t a1[4] = {k[0][step].z, k[1][step].z, k[0][step].w, k[1][step].w};
      const uint32_t b1[2] = {query[step].z, query[step].w};
      mma_m16n8k16(other, a1, b1, T());
    }
    if (kRest) {
      const uint32_t a[4] = {k_rest[0].x, k_rest[1].x, k_rest[0].y, k_rest[1].y};
      const uint32_t b[2] = {query_rest.x, query_rest.y};
      mma_m16n8k16(s, a, b, T());
    }
    if (n + kWarps < w.pages) load_keys(page_of(i + 1));
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int key = g + 4 * (j & 2);
      const bool sees = key < seen && (!Bounds::Windowed || n > 0 || key >= w.low);
      if constexpr (Bounds::Capped)
        s[j] = sees ? attention::tanh_approx((s[j] + other[j]) * bounds.inner) * scale
                    : kDecodeMasked;
      else
        s[j] = sees ? (s[j] + other[j]) * scale : kDecodeMasked;
    }

    float best[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      best[j] = fmaxf(s[j], s[j + 2]);
#pragma unroll
      for (int step = 4; step < 32; step *= 2)
        best[j] = fmaxf(best[j], __shfl_xor_sync(0xffffffffu, best[j], step));
      best[j] = fmaxf(best[j], top[j]);
    }
    if (__any_sync(0xffffffffu, best[0] > top[0] || best[1] > top[1])) {
      const float shrink[2] = {exp2_approx(top[0] - best[0]), exp2_approx(top[1] - best[1])};
#pragma unroll
      for (int r = 0; r < kRegs; ++r)
#pragma unroll
        for (int j = 0; j < 4; ++j) output[r][j] *= shrink[j & 1];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        total[j] *= shrink[j];
        top[j] = best[j];
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      s[j] = exp2_approx(s[j] - top[j & 1]);
      total[j & 1] += s[j];
    }

    // P^T as a B fragment: of head g the keys 2 t, 2 t + 1 and 8 further on.
    uint32_t p[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint32_t pair = pack_pair<T>(s[2 * j], s[2 * j + 1]);
      const uint32_t even = __shfl_sync(0xffffffffu, pair, 8 * t + g / 2);
      const uint32_t odd = __shfl_sync(0xffffffffu, pair, 8 * t + 4 + g / 2);
      p[j] = __byte_perm(even, odd, g & 1 ? 0x7632 : 0x5410);
    }
#pragma unroll
    for (int r = 0; r < kRegs; ++r) {
      const uint32_t a[4] = {
          __byte_perm(v[0][r], v[1][r], 0x5410), __byte_perm(v[0][r], v[1][r], 0x7632),
          __byte_perm(v[2][r], v[3][r], 0x5410), __byte_perm(v[2][r], v[3][r], 0x7632)};
      mma_m16n8k16(output[r], a, p, T());
    }
  }

#pragma unroll
  for (int j = 0; j < 2; ++j) {
#pragma unroll
    for (int step = 4; step < 32; step *= 2)
      total[j] += __shfl_xor_sync(0xffffffffu, total[j], step);
    const int head = 2 * t + j;
    if (head < kHeads) {
      if (g == 0) merge.set(warp, head, top[j], total[j]);
      float* const to = reinterpret_cast<float*>(merge.output) + (warp * kHeads + head) * kDim;
#pragma unroll
      for (int c = 0; c < kFull; ++c)
#pragma unroll
        for (int r = 4 * c; r < 4 * c + 4; r += 2)
          *reinterpret_cast<float4*>(to + 64 * c + 8 * g + 2 * (r - 4 * c)) = make_float4(
              output[r][j], output[r][j + 2], output[r + 1][j], output[r + 1][j + 2]);
      if (kDim % 64 >= 32)
        *reinterpret_cast<float4*>(to + 64 * kFull + 4 * g) =
            make_float4(output[4 * kFull][j], output[4 * kFull][j + 2], output[4 * kFull + 1][j],
                        output[4 * kFull + 1][j + 2]);
      if (kDim % 32 == 16)
        *reinterpret_cast<float2*>(to + (kDim - 16) + 2 * g) =
            make_float2(output[kRegs - 1][j], output[kRegs - 1][j + 2]);
    }
  }
  merge.finish(w, out + head_at * kDim, lse + head_at, part, heads);
#endif
}

// float32: 16 lanes a key, a warp two keys at a time, four times.
template <int kDim, int kKvHeads, int kGroup, int kWarps, class Bounds>
__device__ __forceinline__ void decode_plain(const Bounds& bounds, const float* q,
                                             const float* pages, const int* page_indptr,
                                             const int* page_indices, const int* length_info,
                                             float* out, float* lse, float* part, int rows,
                                             int chunk_pages, float sm_scale) {
  constexpr int kMost = decode_most(4, kDim);
  constexpr int kUnits = decode_units(kGroup, kMost), kHeads = decode_heads(kGroup, kMost);
  constexpr int kQuads = kDim / 4, kSteps = (kQuads + 15) / 16, kRound = kDim > 128 ? 2 : 4;
  constexpr size_t kFar = static_cast<size_t>(kKvHeads) * kPageSlots * kDim;
  __shared__ __align__(16) DecodeMerge<kDim, kHeads, kWarps> merge;

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, side = lane / 16, x = lane % 16;
  const int kv = blockIdx.y / kUnits, first_head = (blockIdx.y % kUnits) * kHeads;
  const int heads = min(kHeads, kGroup - first_head);
  const DecodeWork w = find_decode_work(bounds, page_indptr, length_info, rows, chunk_pages);
  if (!w.any) return;
  const size_t head_at = static_cast<size_t>(w.sequence) * (kKvHeads * kGroup) + kv * kGroup +
                         first_head;
  const float scale = sm_scale * 1.4426950408889634f;
  const float4 zero = make_float4(0, 0, 0, 0);

  float4 query[kHeads][kSteps], output[kHeads][kSteps];
  float top[kHeads], total[kHeads];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    top[h] = kDecodeEmpty;
    total[h] = 0;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const bool inside = h < heads && x + 16 * s < kQuads;
      float4 v = inside ? reinterpret_cast<const float4*>(q + (head_at + h) * kDim)[x + 16 * s]
                        : zero;
      const float factor = Bounds::Capped ? bounds.inner : scale;
      query[h][s] = make_float4(v.x * factor, v.y * factor, v.z * factor, v.w * factor);
      output[h][s] = zero;
    }
  }

#pragma unroll 1
  for (int n = warp; n < w.pages; n += kWarps) {
    const int page = page_indices[w.first + n];
    const float* const keys = pages + (static_cast<size_t>(page) * (2 * kKvHeads) + kv) *
                                          (kPageSlots * kDim);
    const int seen = min(kPageSlots, w.keys - n * kPageSlots);
#pragma unroll 1
    for (int first = 0; first < seen; first += 2 * kRound) {
      float4 k[kRound][kSteps], v[kRound][kSteps];
#pragma unroll
      for (int i = 0; i < kRound; ++i) {
        const int key = first + 2 * i + side;
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          const bool valid = key < seen && x + 16 * s < kQuads;
          const float4* const from = reinterpret_cast<const float4*>(keys + key * kDim);
          k[i][s] = valid ? __ldg(from + x + 16 * s) : zero;
          v[i][s] = valid ? __ldg(from + kFar / 4 + x + 16 * s) : zero;
        }
      }
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        float score[kRound], best = top[h];
#pragma unroll
        for (int i = 0; i < kRound; ++i) {
          float sum = 0;
#pragma unroll
          for (int s = 0; s < kSteps; ++s) {
            sum = fmaf(query[h][s].x, k[i][s].x, sum);
            sum = fmaf(query[h][s].y, k[i][s].y, sum);
            sum = fmaf(query[h][s].z, k[i][s].z, sum);
            sum = fmaf(query[h][s].w, k[i][s].w, sum);
          }
#pragma unroll
          for (int step = 1; step < 16; step *= 2)
            sum += __shfl_xor_sync(0xffffffffu, sum, step);
          if constexpr (Bounds::Capped) sum = tanhf(sum) * scale;
          const int key = first + 2 * i + side;
          const bool sees = key < seen && (!Bounds::Windowed || n > 0 || key >= w.low);
          score[i] = sees ? sum : kDecodeMasked;
          best = fmaxf(best, score[i]);
        }
        const float shrink = exp2_approx(top[h] - best);
        top[h] = best;
        total[h] *= shrink;
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          float4& o = output[h][s];
          o = make_float4(o.x * shrink, o.y * shrink, o.z * shrink, o.w * shrink);
        }
#pragma unroll
        for (int i = 0; i < kRound; ++i) {
          const float weight = exp2_approx(score[i] - best);
          total[h] += weight;
#pragma unroll
          for (int s = 0; s < kSteps; ++s) {
            float4& o = output[h][s];
            o.x = fmaf(weight, v[i][s].x, o.x);
            o.y = fmaf(weight, v[i][s].y, o.y);
            o.z = fmaf(weight, v[i][s].z, o.z);
            o.w = fmaf(weight, v[i][s].w, o.w);
          }
        }
      }
    }
  }

  // The two halves of the warp have different keys.
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    const float best = fmaxf(top[h], __shfl_xor_sync(0xffffffffu, top[h], 16));
    const float shrink = exp2_approx(top[h] - best);
    float sum = total[h] * shrink;
    sum += __shfl_xor_sync(0xffffffffu, sum, 16);
    if (lane == 0) merge.set(warp, h, best, sum);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      float4 o = output[h][s];
      o = make_float4(o.x * shrink, o.y * shrink, o.z * shrink, o.w * shrink);
      o.x += __shfl_xor_sync(0xffffffffu, o.x, 16);
      o.y += __shfl_xor_sync(0xffffffffu, o.y, 16);
      o.z += __shfl_xor_sync(0xffffffffu, o.z, 16);
      o.w += __shfl_xor_sync(0xffffffffu, o.w, 16);
      if (side == 0 && x + 16 * s < kQuads)
        merge.output[(warp * kHeads + h) * kQuads + x + 16 * s] = o;
    }
  }
  merge.finish(w, out + head_at * kDim, lse + head_at, part, heads);
}

// Grid (chunks, KV heads * units of one). `part` has room for gridDim.x * gridDim.y partial results
// of DecodeMerge::kPart floats.
template <typename T, int kDim, int kKvHeads, int kGroup, int kWarps, class Bounds>
__device__ __forceinline__ void attention_decode_in(const Bounds& bounds, const T* q,
                                                    const T* pages, const int* page_indptr,
                                                    const int* page_indices,
                                                    const int* length_info, T* out, float* lse,
                                                    float* part, int rows, int id_count,
                                                    int chunk_pages, float sm_scale) {
  if constexpr (sizeof(T) == 4)
    decode_plain<kDim, kKvHeads, kGroup, kWarps>(bounds, q, pages, page_indptr, page_indices,
                                                 length_info, out, lse, part, rows, chunk_pages,
                                                 sm_scale);
  else
    decode_matrix<T, kDim, kKvHeads, kGroup, kWarps>(bounds, q, pages, page_indptr, page_indices,
                                                     length_info, out, lse, part, rows, id_count,
                                                     chunk_pages, sm_scale);
}

template <typename T, int kDim, int kKvHeads, int kGroup, int kWarps>
__device__ __forceinline__ void attention_decode(const T* q, const T* pages,
                                                 const int* page_indptr, const int* page_indices,
                                                 const int* length_info, T* out, float* lse,
                                                 float* part, int rows, int id_count,
                                                 int chunk_pages, float sm_scale) {
  attention_decode_in<T, kDim, kKvHeads, kGroup, kWarps>(
      attention::Unbounded{}, q, pages, page_indptr, page_indices, length_info, out, lse, part,
      rows, id_count, chunk_pages, sm_scale);
}

// The same for a launch that may begin before the one before has ended.
template <typename T, int kDim, int kKvHeads, int kGroup, int kWarps>
__device__ __forceinline__ void attention_decode_dependent(
    const T* q, const T* pages, const int* page_indptr, const int* page_indices,
    const int* length_info, T* out, float* lse, float* part, int rows, int id_count,
    int chunk_pages, float sm_scale) {
  grid_dependency_launch();
  grid_dependency_wait();
  attention_decode<T, kDim, kKvHeads, kGroup, kWarps>(
      settled(q), settled(pages), settled(page_indptr), settled(page_indices),
      settled(length_info), out, lse, part, rows, id_count, chunk_pages, sm_scale);
}

// Both with bounds on scores and keys: attention::Bounded. sm_scale: of what the cap gives.
template <bool kCap, bool kWindow, typename T, int kDim, int kKvHeads, int kGroup, int kWarps>
__device__ __forceinline__ void bounded_attention_decode(
    float inner, const int* positions, const int* offsets, int window, const T* q, const T* pages,
    const int* page_indptr, const int* page_indices, const int* length_info, T* out, float* lse,
    float* part, int rows, int id_count, int chunk_pages, float sm_scale) {
  const attention::Bounded<kCap, kWindow> bounds{inner, positions, offsets, window};
  attention_decode_in<T, kDim, kKvHeads, kGroup, kWarps>(bounds, q, pages, page_indptr,
                                                         page_indices, length_info, out, lse, part,
                                                         rows, id_count, chunk_pages, sm_scale);
}

template <bool kCap, bool kWindow, typename T, int kDim, int kKvHeads, int kGroup, int kWarps>
__device__ __forceinline__ void bounded_attention_decode_dependent(
    float inner, const int* positions, const int* offsets, int window, const T* q, const T* pages,
    const int* page_indptr, const int* page_indices, const int* length_info, T* out, float* lse,
    float* part, int rows, int id_count, int chunk_pages, float sm_scale) {
  grid_dependency_launch();
  grid_dependency_wait();
  bounded_attention_decode<kCap, kWindow, T, kDim, kKvHeads, kGroup, kWarps>(
      inner, settled(positions), settled(offsets), window, settled(q), settled(pages),
      settled(page_indptr), settled(page_indices), settled(length_info), out, lse, part, rows,
      id_count, chunk_pages, sm_scale);
}

}  // namespace mlc
