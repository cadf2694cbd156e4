// Attention of many rows on Hopper's warpgroup products, for head sizes of 64 and 128.
//
// - As attention_prefill.cuh: rows of the `Group` query heads of a KV head share a tile, causal
//   blocks are skipped, softmax is online in base 2. A warpgroup has 64 rows.
// - Queries and probabilities are operands in registers, K and V in shared memory: [64 columns]
//   [key][64 elements], 128 bytes a row, 16-byte pieces permuted (piece p of row r at p ^ (r % 8)).
//   V is the same way round as K and read as a matrix with its columns together.
// - Softmax of a block runs while the product with V of the block before does (FlashAttention-3,
//   Shah et al. 2024, section 3.2). K and V have two places each.
// - All threads copy, with one barrier a block; or a warpgroup of its own copies (`Copiers`), and
//   the others wait for nothing but their data, which takes a multiprocessor whole.
#pragma once
#include "attention_prefill.cuh"
#include "ptx_attention_sm90.cuh"
#include "ptx_sm90.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
namespace mlc {
namespace attention {

// Where 16 bytes of a block go.
template <int Keys, typename T>
__device__ __forceinline__ auto permuted(T* block) {
  return [=](int row, int chunk) {
    return block + chunk / 8 * (Keys * 64) + row * 64 + (chunk ^ row) % 8 * 8;
  };
}

template <typename T, int D, int Group, int KVHeads, int Warpgroups, int Keys, bool Copiers,
          class Source, typename Out>
__device__ __forceinline__ void tile_sm90(const T* q, Source& source, Out* out, float* lse,
                                          int rows, int first, int key_count, bool causal,
                                          Part part, float scale, unsigned char* memory) {
  constexpr int Rows = 64 * Warpgroups, Warps = 4 * Warpgroups;
  constexpr int Pitch = D + 8, Chunks = D / 8, Heads = Group * KVHeads, Block = Keys * D;
  static_assert(D % 64 == 0 && (32 * PageSize) % Keys == 0, "block sizes");
  static_assert(!Copiers || Warpgroups == 2, "the registers of three warpgroups");

  T* const shared_k = reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(memory) + 1023) / 1024 *
                                           1024);
  T* const shared_v = shared_k + 2 * Block;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  T* const warp_q = shared_v + 2 * Block + warp * 16 * Pitch;  // queries, in the end the output

  const int last = min(first + Rows, rows) - 1, ahead = key_count - rows / Group;
  const Range range = Range::of<Group, Keys>(rows, first, last, key_count, causal, part);
  const int blocks = max(range.end - range.begin + Keys - 1, 0) / Keys;

  constexpr int Threads = Copiers ? 128 : 32 * Warps, Unroll = Copiers ? 4 : Keys;
  const auto copy_keys = [&](const Source& source, int block) {
    copy_block<false, D, Keys, Threads, Unroll>(source, range.begin + block * Keys, range.end,
                                                permuted<Keys>(shared_k + block % 2 * Block));
  };
  const auto copy_values = [&](const Source& source, int block) {
    copy_block<true, D, Keys, Threads, Unroll>(source, range.begin + block * Keys, range.end,
                                               permuted<Keys>(shared_v + block % 2 * Block));
  };

  // Of copiers, for the two places: K (V) is there; K (V) is done with.
  __shared__ uint64_t ready_k[2], ready_v[2], done_k[2], done_v[2];
  if constexpr (Copiers) {
    if (thread == 0) {
      for (int i = 0; i < 2; ++i) {
        barrier_init(&ready_k[i], Threads);
        barrier_init(&ready_v[i], Threads);
        barrier_init(&done_k[i], Warps);
        barrier_init(&done_v[i], Warps);
      }
      barrier_init_done();
    }
    __syncthreads();
    if (warp >= Warps) {
      give_registers<40>();
      Source keys = source, values = source;
      keys.start(range.begin);
      values.start(range.begin);
      for (int block = 0; block <= blocks; ++block) {  // in the order of use: K is a block ahead
        if (block < blocks) {
          if (block > 0) keys.reach(range.begin + block * Keys);
          barrier_wait(&done_k[block % 2], (block / 2 + 1) % 2);
          copy_keys(keys, block);
          arrive_with_copies(&ready_k[block % 2]);
        }
        if (block > 0) {
          const int before = block - 1;
          if (before > 0) values.reach(range.begin + before * Keys);
          barrier_wait(&done_v[before % 2], (before / 2 + 1) % 2);
          copy_values(values, before);
          arrive_with_copies(&ready_v[before % 2]);
        }
      }
      return;
    }
    take_registers<232>();
  }

#pragma unroll
  for (int i = 0; i < 16 * Chunks; i += 32) {
    const int n = i + lane, row = n / Chunks, chunk = n % Chunks;
    const int at = first + warp * 16 + row;
    const T* from = q + static_cast<int64_t>(at / Group) * (Heads * D) + at % Group * D + chunk * 8;
    copy_async_16(warp_q + row * Pitch + chunk * 8, from, at < rows);
  }
  copy_async_commit();
  if constexpr (Copiers) {
    copy_async_wait<0>();
  } else {
    source.start(range.begin);
    copy_keys(source, 0);
    copy_async_commit();
    copy_values(source, 0);
    if (blocks > 1) {
      source.reach(range.begin + Keys);
      copy_keys(source, 1);
    }
    copy_async_commit();
    copy_async_wait<2>();
  }
  __syncwarp();
  uint32_t query[D / 16][4];
#pragma unroll
  for (int k = 0; k < D / 16; ++k)
    load_matrix_x4(query[k], warp_q + lane % 16 * Pitch + k * 16 + lane / 16 * 8);

  float output[D / 2], score[Keys / 2], top[2] = {Lowest, Lowest}, total[2] = {0, 0}, shrink[2];
  uint32_t weight[Keys / 16][4];
#pragma unroll
  for (int i = 0; i < D / 2; ++i) output[i] = 0;
  const uint64_t keys_at = block_descriptor<Keys>(shared_k);
  const uint64_t values_at = block_descriptor<Keys>(shared_v);
  constexpr int Step = Block * 2 >> 4;  // from a block to the next, in a descriptor

  // The thread's warp is done with what `barrier` stands for.
  const auto done = [&](uint64_t* barrier) {
    if constexpr (Copiers) {
      __syncwarp();
      if (lane == 0) barrier_arrive(barrier);
    }
  };
  const auto wait = [&](uint64_t* barrier, int block) {
    if constexpr (Copiers) {
      barrier_wait(barrier, block / 2 % 2);
      fence_shared_for_products();
    }
  };
  const auto multiply_keys = [&](int block) {
    wait(&ready_k[block % 2], block);
    wgmma_fence();
    const uint64_t b = keys_at + block % 2 * Step;
    product<false, false>(score, query[0], b, T());
#pragma unroll
    for (int k = 1; k < D / 16; ++k)
      product<false, true>(score, query[k], b + k / 4 * (Keys * 128 >> 4) + k % 4 * 2, T());
    wgmma_commit();
  };
  const auto multiply_values = [&](int block) {
    wait(&ready_v[block % 2], block);
    wgmma_fence();
    const uint64_t b = values_at + block % 2 * Step;
#pragma unroll
    for (int k = 0; k < Keys / 16; ++k)
      product<true, true>(output, weight[k], b + k * (2048 >> 4), T());
    wgmma_commit();
  };
  const auto soften = [&](int block) {
    const int begin = range.begin + block * Keys;
    if (begin + Keys > range.unmasked) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = first + warp * 16 + i * 8 + lane / 4;
        const int end = causal ? min(ahead + row / Group + 1, key_count) : key_count;
        const int limit = end - begin - lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < Keys / 8; ++j) {
          if (j * 8 >= limit) score[4 * j + 2 * i] = -INFINITY;
          if (j * 8 + 1 >= limit) score[4 * j + 2 * i + 1] = -INFINITY;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float best = score[2 * i];
#pragma unroll
      for (int j = 0; j < Keys / 8; ++j)
        best = fmaxf(best, fmaxf(score[4 * j + 2 * i], score[4 * j + 2 * i + 1]));
      best = fmaxf(top[i], max_of_row(best));
      shrink[i] = exp2_approx((top[i] - best) * scale);
      top[i] = best;
      const float offset = best * scale;
      float sum = 0;
#pragma unroll
      for (int j = 0; j < Keys / 8; ++j)
#pragma unroll
        for (int c = 4 * j + 2 * i; c < 4 * j + 2 * i + 2; ++c) {
          score[c] = exp2_approx(score[c] * scale - offset);
          sum += score[c];
        }
      total[i] = total[i] * shrink[i] + sum;
    }
  };
  const auto round_weights = [&] {
#pragma unroll
    for (int k = 0; k < Keys / 16; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        weight[k][i] = pack(score[8 * k + 2 * i], score[8 * k + 2 * i + 1], T());
  };

  // Without copiers: what was asked for is there, for all, and all are done with what came before.
  const auto meet = [&] {
    if constexpr (!Copiers) {
      fence_shared_for_products();
      __syncthreads();
    }
  };
  if (blocks > 0) {
    copy_async_wait<1>();
    meet();
    multiply_keys(0);
    wgmma_wait<0>();
    wgmma_hold(score);
    done(&done_k[0]);
    soften(0);
    round_weights();
    for (int block = 0; block + 1 < blocks; ++block) {
      if constexpr (!Copiers) {
        copy_async_wait<0>();
        meet();
        copy_values(source, block + 1);
        if (block + 2 < blocks) {
          source.reach(range.begin + (block + 2) * Keys);
          copy_keys(source, block + 2);
        }
        copy_async_commit();
      }
      wgmma_hold(score);
      wgmma_hold(output);
      multiply_keys(block + 1);
      multiply_values(block);
      wgmma_wait<1>();
      wgmma_hold(score);
      done(&done_k[(block + 1) % 2]);
      soften(block + 1);
      wgmma_wait<0>();
      wgmma_hold(output);
#pragma unroll
      for (int k = 0; k < Keys / 16; ++k) wgmma_hold(weight[k]);
      done(&done_v[block % 2]);
#pragma unroll
      for (int i = 0; i < D / 2; ++i) output[i] *= shrink[i / 2 % 2];
      round_weights();
    }
    copy_async_wait<0>();
    meet();
    wgmma_hold(output);
    multiply_values(blocks - 1);
    wgmma_wait<0>();
    wgmma_hold(output);
  }

  copy_async_wait<0>();
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float sum = sum_of_row(total[i]);
    const float inverse = sum > 0 ? 1 / sum : 0;
    const int row = i * 8 + lane / 4, at = first + warp * 16 + row;
    const int64_t to = static_cast<int64_t>(at / Group) * Heads + at % Group;
#pragma unroll
    for (int u = 0; u < D / 8; ++u)
      put(out + to * D, warp_q + row * Pitch, u * 8 + lane % 4 * 2,
          output[4 * u + 2 * i] * inverse, output[4 * u + 2 * i + 1] * inverse, at < rows);
    if (lane % 4 == 0 && at < rows) lse[to] = sum > 0 ? top[i] * scale + log2f(sum) : Lowest;
  }
  __syncwarp();
  leave<D, Group, Heads, 16>(out, warp_q, first + warp * 16, rows);
}

}  // namespace attention
}  // namespace mlc
#endif

namespace mlc {

// The two kernels, as in attention_prefill.cuh; empty but for sm_90a.
template <typename T, int D, int Group, int KVHeads, int Warpgroups, int Keys,
          bool Copiers>
__device__ __forceinline__ void prefill_ragged_sm90(const T* q, const int* q_ends, const T* k,
                                                    const T* v, const int* key_ends, T* out,
                                                    float* lse, int batch, bool causal,
                                                    float scale, unsigned char* memory) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  attention::with_ragged_tile<D, Group, KVHeads, 64 * Warpgroups>(
      q, q_ends, k, v, key_ends, out, lse, batch,
      [&](const T* q, auto& source, T* out, float* lse, int rows, int first, int keys, int) {
        attention::tile_sm90<T, D, Group, KVHeads, Warpgroups, Keys, Copiers>(
            q, source, out, lse, rows, first, keys, causal, {0, 1}, scale, memory);
      });
#endif
}

template <typename T, int D, int Group, int KVHeads, int Warpgroups, int Keys,
          bool Copiers, typename Out>
__device__ __forceinline__ void prefill_paged_sm90(const T* q, const int* q_ends, const T* pages,
                                                   const int* page_ends, const int* page_table,
                                                   const int* last_fill, Out* out, float* lse,
                                                   int count, int batch, bool causal, float scale,
                                                   unsigned char* memory) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const attention::Part part = attention::part_of<T, Out>();
  const int64_t before = static_cast<int64_t>(part.index) * count;
  attention::with_paged_tile<D, Group, KVHeads, 64 * Warpgroups>(
      q, q_ends, pages, page_ends, page_table, last_fill, out + before * D, lse + before, batch,
      [&](const T* q, auto& source, Out* out, float* lse, int rows, int first, int keys, int) {
        attention::tile_sm90<T, D, Group, KVHeads, Warpgroups, Keys, Copiers>(
            q, source, out, lse, rows, first, keys, causal, part, scale, memory);
      });
#endif
}

}  // namespace mlc
