// Barriers in shared memory, bulk copies and warpgroup products. Source of layouts and semantics:
// PTX ISA, "mbarrier", "cp.async.bulk", "Asynchronous warpgroup level matrix instructions" and
// "Matrix descriptor".
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <vector>

extern "C" {
void emu_access(const void* p, unsigned bytes, int write, int lane);
[[noreturn]] void emu_fault(const char* what, const char* file, int line);
void* emu_from_shared(unsigned address);
unsigned emu_shared_address(const void* p, const char* file, int line);
void emu_collective(int kind, unsigned mask, void* request,
                    void (*combine)(void* const* requests, unsigned mask), const char* file,
                    int line);
void emu_block(const char* what, const char* file, int line);
void emu_wake(unsigned t);
unsigned emu_thread();
unsigned emu_block_serial();
void emu_here(const char* file, int line);
void emu_settle();
void emu_clocks_give(std::vector<unsigned>& clocks);
void emu_clocks_take(const std::vector<unsigned>& clocks);
void emu_async_begin(void* shared, unsigned bytes, const char* file, int line);
void emu_async_end(void* shared, unsigned bytes);
size_t emu_hand_over();
void emu_finish_handed(unsigned t, size_t count);
}

namespace {

struct bulk {
  void* to;
  std::vector<char> data;
};

// An arrival once the first `count` copies that a thread has handed over are there.
struct late_arrival {
  unsigned thread;
  size_t count;
  std::vector<unsigned> clocks;
};

struct mbarrier {
  int count = 0, left = 0;
  unsigned phase = 0;  // its parity is that of the phase under way
  long long bytes = 0;  // that copies have yet to bring
  std::vector<bulk> copies;
  std::vector<late_arrival> late;
  std::vector<unsigned> waiting;
  std::vector<unsigned> coming, over;  // clocks of this phase and of those before
};

struct product {
  float* d;
  unsigned count;
  uint32_t a[4];
  uint64_t b;
  bool bfloat, columns, add;
};

struct queue {  // of one thread
  std::vector<std::vector<product>> groups;
  std::vector<product> open;
  std::map<float*, std::vector<float>> values;  // of registers that products are under way to
};

unsigned serial = 0;
std::map<const void*, mbarrier> barriers;
std::vector<queue> queues;

// What a block leaves is not the next one's.
void renew() {
  if (serial == emu_block_serial()) return;
  serial = emu_block_serial();
  barriers.clear();
  queues.clear();
}

mbarrier& find(const void* p, const char* file, int line) {
  renew();
  emu_here(file, line);
  emu_settle();
  auto at = barriers.find(p);
  if (at == barriers.end()) emu_fault("a barrier that was not initialised", file, line);
  return at->second;
}

// The phase ends when all have arrived and all bytes are there.
void advance(mbarrier& b) {
  if (b.left > 0 || b.bytes != 0) return;
  for (bulk& c : b.copies) {
    memcpy(c.to, c.data.data(), c.data.size());
    emu_async_end(c.to, static_cast<unsigned>(c.data.size()));
  }
  b.copies.clear();
  b.left = b.count;
  b.phase++;
  b.over = b.coming;
  for (unsigned t : b.waiting) emu_wake(t);
  b.waiting.clear();
}

// Copies are there when somebody waits for them, and no sooner.
void bring(mbarrier& b) {
  std::vector<late_arrival> late;
  late.swap(b.late);
  for (const late_arrival& a : late) {
    emu_finish_handed(a.thread, a.count);
    if (b.left <= 0) emu_fault("one arrival too many at a barrier", "", 0);
    b.coming.resize(std::max(b.coming.size(), a.clocks.size()), 0);
    for (size_t i = 0; i < a.clocks.size(); i++) b.coming[i] = std::max(b.coming[i], a.clocks[i]);
    b.left--;
    advance(b);
  }
}

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

queue& own() {
  renew();
  unsigned t = emu_thread();
  if (queues.size() <= t) queues.resize(1024);
  return queues[t];
}

// b[k][n] of a tile in shared memory, of which each 16 bytes that are read are checked.
void load_b(const product& p, std::vector<float>& b) {
  unsigned n_count = p.count * 2, start = static_cast<unsigned>(p.b & 0x3FFF) << 4;
  unsigned leading = static_cast<unsigned>(p.b >> 16 & 0x3FFF) << 4;
  unsigned stride = static_cast<unsigned>(p.b >> 32 & 0x3FFF) << 4;
  if (p.b >> 62 != 1) emu_fault("a descriptor without the swizzle of 128 bytes", "", 0);
  b.resize(16 * n_count);
  // Of eight elements that lie together: `major` is the index they differ in.
  auto read = [&](unsigned address, unsigned lane, uint16_t (&e)[8]) {
    address ^= (address >> 7 & 7) << 4;
    const void* at = emu_from_shared(address);
    emu_access(at, 16, 0, static_cast<int>(lane));
    memcpy(e, at, 16);
  };
  uint16_t e[8];
  if (p.columns) {
    for (unsigned k = 0; k < 16; k++)
      for (unsigned n = 0; n < n_count; n += 8) {
        read(start + n / 64 * leading + k / 8 * stride + k % 8 * 128 + n % 64 * 2, n / 8 % 32, e);
        for (unsigned i = 0; i < 8; i++)
          b[k * n_count + n + i] = p.bfloat ? bfloat(e[i]) : half(e[i]);
      }
  } else {
    for (unsigned n = 0; n < n_count; n++)
      for (unsigned k = 0; k < 16; k += 8) {
        read(start + n / 8 * stride + n % 8 * 128 + k * 2, n % 32, e);
        for (unsigned i = 0; i < 8; i++)
          b[(k + i) * n_count + n] = p.bfloat ? bfloat(e[i]) : half(e[i]);
      }
  }
}

// The n-th product of every lane: 16 rows of the 64, d[4j + i] is row lane / 4 + 8 (i / 2), column
// 8j + 2 (lane % 4) + i % 2.
void multiply(queue* const* lanes, unsigned n) {
  const product& first = lanes[0]->groups.front()[n];
  static std::vector<float> b, sums;
  load_b(first, b);
  unsigned n_count = first.count * 2;
  float a[16][16];
  sums.assign(16 * n_count, 0);
  for (unsigned lane = 0; lane < 32; lane++) {
    const product& p = lanes[lane]->groups.front()[n];
    if (p.b != first.b || p.count != first.count || p.add != first.add)
      emu_fault("lanes of a warp that differ in their products", "", 0);
    unsigned group = lane / 4, pair = lane % 4 * 2;
    for (unsigned e = 0; e < 2; e++)
      for (unsigned i = 0; i < 4; i++) {
        auto bits = static_cast<uint16_t>(p.a[i] >> (16 * e));
        a[group + (i & 1) * 8][pair + e + (i >> 1) * 8] = p.bfloat ? bfloat(bits) : half(bits);
      }
  }
  for (unsigned i = 0; i < 16; i++)
    for (unsigned k = 0; k < 16; k++) {
      float factor = a[i][k];
      const float* from = &b[k * n_count];
      float* to = &sums[i * n_count];
      for (unsigned j = 0; j < n_count; j++) to[j] += factor * from[j];
    }
  for (unsigned lane = 0; lane < 32; lane++) {
    product& p = lanes[lane]->groups.front()[n];
    std::vector<float>& d = lanes[lane]->values[p.d];
    for (unsigned i = 0; i < p.count; i++) {
      unsigned r = lane / 4 + 8 * (i % 4 / 2), c = i / 4 * 8 + lane % 4 * 2 + i % 2;
      d[i] = (p.add ? d[i] : 0) + sums[r * n_count + c];
    }
  }
}

struct wait_request {
  queue* q;
  unsigned pending;
};

void wait_all(void* const* requests, unsigned) {
  queue* lanes[32];
  unsigned pending = static_cast<wait_request*>(requests[0])->pending;
  for (int i = 0; i < 32; i++) {
    lanes[i] = static_cast<wait_request*>(requests[i])->q;
    if (lanes[i]->groups.size() != lanes[0]->groups.size())
      emu_fault("lanes of a warp that have committed other groups of products", "", 0);
  }
  while (lanes[0]->groups.size() > pending) {
    for (queue* q : lanes)
      if (q->groups.front().size() != lanes[0]->groups.front().size())
        emu_fault("lanes of a warp that have begun other products", "", 0);
    for (unsigned n = 0; n < lanes[0]->groups.front().size(); n++) multiply(lanes, n);
    for (queue* q : lanes) q->groups.erase(q->groups.begin());
  }
  // Registers get their values when nothing is under way to them.
  for (queue* q : lanes)
    for (auto at = q->values.begin(); at != q->values.end();) {
      bool busy = false;
      for (const auto& group : q->groups)
        for (const product& p : group) busy |= p.d == at->first;
      for (const product& p : q->open) busy |= p.d == at->first;
      if (busy) {
        ++at;
        continue;
      }
      memcpy(at->first, at->second.data(), at->second.size() * sizeof(float));
      at = q->values.erase(at);
    }
}

struct rows {
  void* row;
  uint32_t r[4];
};

void store_transposed(void* const* requests, unsigned) {
  for (unsigned lane = 0; lane < 32; lane++) {
    void* p = static_cast<rows*>(requests[lane])->row;
    if (reinterpret_cast<uintptr_t>(p) % 16)
      emu_fault("a matrix store to a row that is not 16-byte aligned", "", 0);
    unsigned matrix = lane / 8, r = lane % 8;
    uint16_t element[8];
    for (unsigned c = 0; c < 8; c++) {
      uint32_t word = static_cast<rows*>(requests[c * 4 + r / 2])->r[matrix];
      element[c] = static_cast<uint16_t>(word >> (16 * (r & 1)));
    }
    emu_access(p, 16, 1, static_cast<int>(lane));
    memcpy(p, element, 16);
    emu_settle();
  }
}

}  // namespace

extern "C" {

#define EMU_EXPORT __attribute__((visibility("default")))

EMU_EXPORT void emu_mbarrier_init(void* p, int count, const char* file, int line) {
  renew();
  emu_here(file, line);
  emu_shared_address(p, file, line);
  if (reinterpret_cast<uintptr_t>(p) % 8) emu_fault("a barrier that is not aligned", file, line);
  if (count < 1) emu_fault("a barrier for nobody", file, line);
  emu_access(p, 8, 1, -1);
  emu_settle();
  mbarrier b;
  b.count = b.left = count;
  barriers[p] = b;
}

EMU_EXPORT void emu_mbarrier_arrive(void* p, int bytes, const char* file, int line) {
  mbarrier& b = find(p, file, line);
  if (b.left <= 0) emu_fault("one arrival too many at a barrier", file, line);
  emu_access(p, 8, 0, -1);  // whoever initialised it must come before
  emu_clocks_give(b.coming);
  b.bytes += bytes;
  b.left--;
  advance(b);
}

EMU_EXPORT void emu_mbarrier_arrive_late(void* p, const char* file, int line) {
  mbarrier& b = find(p, file, line);
  emu_access(p, 8, 0, -1);
  late_arrival a{emu_thread(), emu_hand_over(), {}};
  emu_clocks_give(a.clocks);
  b.late.push_back(std::move(a));
  if (!b.waiting.empty()) bring(b);
}

EMU_EXPORT void emu_mbarrier_wait(void* p, int parity, const char* file, int line) {
  mbarrier& b = find(p, file, line);
  emu_access(p, 8, 0, -1);
  bring(b);
  while ((b.phase & 1) == (static_cast<unsigned>(parity) & 1)) {
    b.waiting.push_back(emu_thread());
    emu_block("a wait for a barrier in shared memory", file, line);
  }
  emu_clocks_take(b.over);
}

EMU_EXPORT void emu_copy_bulk(void* shared, const void* global, int bytes, void* p,
                              const char* file, int line) {
  mbarrier& b = find(p, file, line);
  if (bytes <= 0 || bytes % 16 || reinterpret_cast<uintptr_t>(shared) % 16 ||
      reinterpret_cast<uintptr_t>(global) % 16)
    emu_fault("a bulk copy that is not of 16-byte pieces", file, line);
  emu_access(global, static_cast<unsigned>(bytes), 0, -1);
  bulk c{shared, {}};
  c.data.resize(static_cast<size_t>(bytes));
  memcpy(c.data.data(), global, c.data.size());
  emu_async_begin(shared, static_cast<unsigned>(bytes), file, line);
  emu_clocks_give(b.coming);
  b.copies.push_back(std::move(c));
  b.bytes -= bytes;
  advance(b);
}

EMU_EXPORT void emu_wgmma(float* d, unsigned count, const uint32_t* a, uint64_t b, int bfloat,
                          int columns, int add) {
  queue& q = own();
  if (!q.values.count(d)) {
    q.values[d].assign(d, d + count);
    memset(d, 0xFF, count * sizeof(float));  // until it is waited for
  }
  q.open.push_back({d, count, {a[0], a[1], a[2], a[3]}, b, bfloat != 0, columns != 0, add != 0});
}

EMU_EXPORT void emu_wgmma_commit() {
  queue& q = own();
  q.groups.push_back(std::move(q.open));
  q.open.clear();
}

EMU_EXPORT void emu_wgmma_wait(unsigned pending, const char* file, int line) {
  wait_request request{&own(), pending};
  emu_collective(7, 0xFFFFFFFFu, &request, wait_all, file, line);
}

EMU_EXPORT void emu_store_matrix_trans(void* row, const uint32_t* r, const char* file, int line) {
  rows request{row, {r[0], r[1], r[2], r[3]}};
  emu_collective(5, 0xFFFFFFFFu, &request, store_transposed, file, line);
}
}
