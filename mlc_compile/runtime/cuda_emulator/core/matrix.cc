// Matrix operations of a warp. Layouts: PTX ISA, "Matrix Fragments for mma.m16n8k16" and
// "ldmatrix".
#include <cstdint>
#include <cstring>

extern "C" {
void emu_access(const void* p, unsigned bytes, int write, int lane);
[[noreturn]] void emu_fault(const char* what, const char* file, int line);
}

namespace {

struct mma {  // emu_mma of include/ptx.cuh
  float d[4];
  uint32_t a[4], b[2];
};
struct rows {
  const void* row;
  uint32_t r[4];
};

float half(uint16_t x) {
  _Float16 h;
  memcpy(&h, &x, 2);
  return static_cast<float>(h);
}
float bfloat(uint16_t x) {
  uint32_t n = uint32_t{x} << 16;
  float f;
  memcpy(&f, &n, 4);
  return f;
}

template <float (*Value)(uint16_t)>
void product(void* const* requests) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; lane++) {
    const mma& r = *static_cast<const mma*>(requests[lane]);
    int group = lane / 4, pair = lane % 4 * 2;
    for (int e = 0; e < 2; e++) {
      int shift = 16 * e;
      for (int i = 0; i < 4; i++)
        a[group + (i & 1) * 8][pair + e + (i >> 1) * 8] =
            Value(static_cast<uint16_t>(r.a[i] >> shift));
      for (int i = 0; i < 2; i++)
        b[pair + e + i * 8][group] = Value(static_cast<uint16_t>(r.b[i] >> shift));
    }
  }
  float d[16][8];
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 8; j++) d[i][j] = 0;
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < 16; k++)
      for (int j = 0; j < 8; j++) d[i][j] += a[i][k] * b[k][j];
  for (int lane = 0; lane < 32; lane++) {
    mma& r = *static_cast<mma*>(requests[lane]);
    int group = lane / 4, pair = lane % 4 * 2;
    for (int i = 0; i < 4; i++) r.d[i] += d[group + (i >> 1) * 8][pair + (i & 1)];
  }
}

template <bool Transposed>
void load(void* const* requests) {
  uint16_t element[4][8][8];
  for (int lane = 0; lane < 32; lane++) {
    const void* p = static_cast<rows*>(requests[lane])->row;
    if (reinterpret_cast<uintptr_t>(p) % 16)
      emu_fault("a matrix load from a row that is not 16-byte aligned", "", 0);
    emu_access(p, 16, 0, lane);
    memcpy(element[lane / 8][lane % 8], p, 16);
  }
  for (int lane = 0; lane < 32; lane++)
    for (int i = 0; i < 4; i++) {
      int row = lane / 4, pair = lane % 4 * 2;
      uint32_t low = Transposed ? element[i][pair][row] : element[i][row][pair];
      uint32_t high = Transposed ? element[i][pair + 1][row] : element[i][row][pair + 1];
      static_cast<rows*>(requests[lane])->r[i] = low | high << 16;
    }
}

}  // namespace

extern "C" {

#define EMU_EXPORT __attribute__((visibility("default")))
EMU_EXPORT void emu_do_mma_half(void* const* requests, unsigned) { product<half>(requests); }
EMU_EXPORT void emu_do_mma_bfloat(void* const* requests, unsigned) { product<bfloat>(requests); }
EMU_EXPORT void emu_do_load_matrix(void* const* requests, unsigned) { load<false>(requests); }
EMU_EXPORT void emu_do_load_matrix_trans(void* const* requests, unsigned) { load<true>(requests); }
}
