// Runs the blocks of a grid one after the other, each thread of a block as a fibre, and checks what
// they do to memory.
//
// A fibre runs until a barrier, an operation of its warp, or its end, and hands over to one that is
// ready; whoever comes last to a barrier makes the others ready. When nobody is ready and not all
// have ended, they wait for what cannot come.
//
// Memory: the compiler calls `__tsan_read4` and its like (see include/cuda_emulator.h). Each two
// bytes of shared memory and of buffers have a cell that remembers who wrote and read them last.
// Two accesses are ordered by vector clocks: thread t has seen what u did up to seen[t][u].
#include "fibre.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <switch.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <vector>


struct emu_index {  // uint3 of CUDA
  unsigned x, y, z;
};

namespace emu {
settings chosen;
}

namespace {

using emu::chosen;

constexpr size_t kStack = 256 << 10;  // with native.py's limit on frames
constexpr size_t kMostShared = 256 << 10;
constexpr size_t kArena = size_t{1} << 42;  // of addresses, not of memory
constexpr size_t kGap = 1 << 16;
constexpr size_t kMostTracked = 64 << 20;  // bytes of a buffer that is checked for races
constexpr unsigned kGranule = 2;
constexpr unsigned kSharedAt = 1024 + 64;  // of dynamic shared memory: 64-byte aligned and no more

using emu::context;
using emu::start_context;
using emu::switch_context;

// ---- what is remembered

struct touch {
  unsigned epoch = 0;  // interval between two barriers of a block, of all blocks; 0: none
  unsigned clock = 0;  // of the thread
  unsigned block = 0;
  unsigned where = 0;
  unsigned short thread = 0;
  unsigned char mask = 0;   // bytes of the cell
  unsigned char state = 0;  // of a write: bytes that were written at all (1, 2), atomic (4)
};

struct cell {
  touch write, read, reread;
  unsigned short rewrite = 0;  // thread + 1 that wrote the value that was there
  unsigned short pending = 0;  // thread + 1 whose asynchronous copy is under way
};
static_assert(sizeof(cell) == 64);

struct region {
  char* data = nullptr;
  size_t bytes = 0;
  cell* cells = nullptr;
  const char* name = "";
  size_t mapped = 0;
  bool owned = false;
  enum { none, buffer, dynamic_shared, static_shared } kind = none;
  bool shared() const { return kind >= dynamic_shared; }
};

struct site {
  const char* file;
  int line;
};

enum class state { ready, barrier, warp, blocked, done };

struct copy {
  char* to;
  unsigned bytes;
  unsigned where;
  char data[16];
};

struct fibre {
  context where{};
  char* stack = nullptr;
  state now = state::ready;
  site at{};
  unsigned barrier = 0;
  unsigned clock = 1;
  // Of an operation of its warp.
  int kind = 0;
  unsigned mask = 0;
  void* request = nullptr;
  const char* blocked = "";  // in what
  // Asynchronous copies: groups that were committed, oldest first, and the open one.
  std::vector<std::vector<copy>> groups;
  std::vector<copy> open;
  std::vector<copy> handed;  // whose end a barrier in shared memory is told
  size_t finished = 0;       // of those
  unsigned atomics = 0;
  bool waited = false;  // for the launches before
};

struct barrier {
  unsigned arrived = 0;
  unsigned expected = 0;
  int predicates = 0;
  int result = 0;
  site at{};
  bool partial = false;
  std::vector<unsigned short> waiting;  // and those that only arrived
};

const char* const kKinds[] = {"a shuffle",        "a vote",
                              "__syncwarp",       "a match",
                              "a reduction",      "a matrix load or store",
                              "a matrix product", "a wait for products of its warpgroup"};

struct library {
  const void* key = nullptr;
  char* low = nullptr;
  char* high = nullptr;
  size_t tls_module = 0, tls_bytes = 0;
  std::string path;
};

struct machine {
  std::vector<fibre> fibres;
  char* stacks = nullptr;
  size_t stacks_bytes = 0;
  context scheduler{};
  std::vector<unsigned short> ready;
  size_t head = 0;  // of `ready`, when it isn't shuffled
  unsigned current = 0, threads = 0, live = 0;
  char* stack = nullptr;  // of the current fibre
  bool running = false;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  emu_index grid{}, block{}, at{};
  const char* name = "";
  std::string fault, said;
  barrier barriers[16];
  unsigned epoch = 0, block_epoch = 0, launch_epoch = 0, block_number = 0;
  bool acquired = false;
  std::vector<unsigned char> fenced;  // by block
  std::vector<unsigned> seen;         // threads x threads
  std::vector<unsigned> joined;
  // Programmatic dependent launches: a thread runs beside the launches since the last one that was
  // none, until it waits for them.
  bool dependent = false, next_is_dependent = false;
  unsigned stable_epoch = 0;
  std::map<unsigned, std::string> launches;  // names by first epoch, since then
  bool crossed = false;  // something other than a whole barrier has ordered two warps
  uint64_t random = 0;
  unsigned char waiting[32] = {};  // lanes in operations of each warp
  // Memory.
  region dynamic, fixed;
  region* last = nullptr;
  char* host_low = nullptr;   // stack of the thread that launches
  char* host_high = nullptr;
  library code;
  std::vector<site> sites;
  std::map<std::pair<const char*, int>, unsigned> site_numbers;
  // A write that is a race unless it changes nothing.
  struct {
    bool active = false;
    char* p = nullptr;
    unsigned bytes = 0, where = 0, thread = 0;
    touch other;
    bool other_writes = false;
    region* in = nullptr;
    char old[16];
  } doubt;
};
machine m;

// By the address after the last byte, so that upper_bound finds what holds an address.
std::map<const char*, region> buffers;
char* arena = nullptr;
size_t arena_used = 0, allocated = 0, peak = 0;

std::string text(const char* format, ...) {
  char line[1024];
  va_list args;
  va_start(args, format);
  vsnprintf(line, sizeof line, format, args);
  va_end(args);
  return line;
}

unsigned next_random() {
  m.random ^= m.random << 13;
  m.random ^= m.random >> 7;
  m.random ^= m.random << 17;
  return static_cast<unsigned>(m.random >> 24);
}

std::string coordinates(unsigned x, unsigned y, unsigned z) { return text("(%u, %u, %u)", x, y, z); }

std::string thread_name(unsigned t) {
  const emu_index& b = m.block;
  if (b.y == 1 && b.z == 1) return text("thread %u", t);
  return "thread " + coordinates(t % b.x, t / b.x % b.y, t / (b.x * b.y));
}

std::string block_name(unsigned n) {
  return "block " + coordinates(n % m.grid.x, n / m.grid.x % m.grid.y, n / (m.grid.x * m.grid.y));
}

std::string base_name(const char* file) {
  const char* slash = strrchr(file, '/');
  return slash ? slash + 1 : file;
}

std::string at(const site& s) {
  return s.file && *s.file ? text(" at %s:%d", base_name(s.file).c_str(), s.line) : "";
}

constexpr unsigned kSite = 0x80000000;  // `where` is a number of m.sites, else an offset of code

unsigned number_of(const site& s) {
  auto [found, fresh] = m.site_numbers.try_emplace({s.file, s.line}, m.sites.size());
  if (fresh) m.sites.push_back(s);
  return kSite | found->second;
}

unsigned where_of(const void* pc) {
  auto* p = static_cast<const char*>(pc);
  if (p < m.code.low || p >= m.code.high) return 0;
  return static_cast<unsigned>(p - m.code.low);
}

// "file:line", innermost first where a function was inlined.
std::string at(unsigned where) {
  if (where & kSite) return at(m.sites[where & ~kSite]);
  if (!where || m.code.path.empty()) return "";
  // One before: where the call returns to may be another line's.
  std::string command = text("addr2line -i -e '%s' 0x%x 2>/dev/null", m.code.path.c_str(), where - 1);
  FILE* pipe = popen(command.c_str(), "r");
  std::string found;
  if (pipe) {
    char line[512];
    for (int n = 0; n < 4 && fgets(line, sizeof line, pipe);) {
      line[strcspn(line, "\n")] = 0;
      if (char* extra = strstr(line, " (discriminator")) *extra = 0;
      std::string place = base_name(line);
      if (place.find('?') != std::string::npos || place.rfind("cuda_", 0) == 0 ||
          place.rfind("ptx", 0) == 0)
        continue;
      found += (n++ ? " < " : " at ") + place;
    }
    pclose(pipe);
  }
  return found.empty() ? text(" at code offset 0x%x", where) : found;
}

[[noreturn]] void stop(const std::string& what) {
  m.fault = std::string(m.name) + ", " + block_name(m.block_number) + ", " + what;
  switch_context(m.fibres[m.current].where, m.scheduler);
  abort();
}

// ---- races

unsigned* row(unsigned t) { return m.seen.data() + size_t{t} * m.threads; }

// Whether another thread's access is not ordered before one of thread t.
bool races(const touch& a, unsigned t, unsigned mask, bool shared) {
  if (a.epoch == 0 || !(a.mask & mask)) return false;
  if (a.epoch >= m.block_epoch) {  // of this block
    if (a.epoch < m.epoch || a.thread == t) return false;
    return a.clock > row(t)[a.thread];
  }
  if (shared) return false;
  if (a.epoch < m.launch_epoch)
    return m.dependent && !m.fibres[t].waited && a.epoch >= m.stable_epoch;
  if (a.block == m.block_number) return false;
  return !(m.acquired && m.fenced[a.block]);
}

std::string describe(const region& r, const char* p) {
  ptrdiff_t byte = p - r.data;
  switch (r.kind) {
    case region::dynamic_shared: return text("dynamic shared memory at byte %td of %zu", byte, r.bytes);
    case region::static_shared: return text("static shared memory at byte %td of %zu", byte, r.bytes);
    default: return text("%s at byte %td of %zu", *r.name ? r.name : "a buffer", byte, r.bytes);
  }
}

std::string describe(const touch& a) {
  if (a.epoch < m.launch_epoch) {
    auto at = m.launches.upper_bound(a.epoch);
    std::string name = at == m.launches.begin() ? "an earlier launch" : std::prev(at)->second;
    return text("thread %u of ", a.thread) + name;
  }
  std::string who = thread_name(a.thread);
  if (a.epoch < m.block_epoch) who += " of " + block_name(a.block);
  return who;
}

[[noreturn]] void report(const region& r, const char* p, bool write, unsigned t, unsigned where,
                         const touch& other, bool other_writes) {
  bool blocks = other.epoch < m.block_epoch;
  stop("race on " + describe(r, p) + ": " + thread_name(t) + (write ? " writes" : " reads") +
       at(where) + " what " + describe(other) + (other_writes ? " writes" : " reads") +
       at(other.where) +
       (other.epoch < m.launch_epoch ? ", which may not have ended: there was no wait for it"
        : blocks                     ? ", and nothing orders the two blocks"
                                     : ", and nothing orders the two"));
}

void settle() {
  auto& d = m.doubt;
  d.active = false;
  if (memcmp(d.p, d.old, d.bytes) != 0)
    report(*d.in, d.p, true, d.thread, d.where, d.other, d.other_writes);
  size_t from = (d.p - d.in->data) / kGranule, end = (d.p - d.in->data + d.bytes - 1) / kGranule;
  for (size_t i = from; i <= end; i++) d.in->cells[i].rewrite = static_cast<unsigned short>(d.thread + 1);
}

enum access { kRead = 0, kWrite = 1, kAtomic = 2, kAsync = 3 };

void track(region& r, char* p, unsigned bytes, access kind, unsigned t, unsigned where) {
  size_t offset = static_cast<size_t>(p - r.data);
  size_t from = offset / kGranule, end = (offset + bytes - 1) / kGranule;
  bool shared = r.shared();
  touch now{m.epoch, m.fibres[t].clock, m.block_number, where, static_cast<unsigned short>(t), 3, 0};
  const touch* other = nullptr;
  bool other_writes = true;
  const char* there = nullptr;
  for (size_t i = from; i <= end; i++) {
    cell& c = r.cells[i];
    unsigned mask = 3;
    if (i == from && offset % kGranule) mask &= 2;
    if (i == end && (offset + bytes) % kGranule) mask &= 1;
    now.mask = static_cast<unsigned char>(mask);
    if (c.pending) {
      if (c.write.epoch < (shared ? m.block_epoch : m.launch_epoch)) {
        c.pending = 0;
      } else {
        stop(describe(r, r.data + i * kGranule) + ": " + thread_name(t) +
             (kind == kRead ? " reads" : " writes") + at(where) + " what an asynchronous copy of " +
             thread_name(c.pending - 1u) + at(c.write.where) + " fills, without a wait for it");
      }
    }
    bool own = c.write.epoch >= m.block_epoch;  // written in this block
    if (kind == kRead) {
      if (shared && (!own || !(c.write.state & mask)))
        stop(describe(r, r.data + i * kGranule) + ": " + thread_name(t) + " reads" + at(where) +
             " what no thread of the block has written");
      if (c.rewrite != t + 1u && races(c.write, t, mask, shared))
        report(r, r.data + i * kGranule, false, t, where, c.write, true);
      (races(c.read, t, 3, shared) ? c.reread : c.read) = now;
      continue;
    }
    bool atomic = kind == kAtomic;
    if (!other) {
      if (!(atomic && (c.write.state & 4)) && races(c.write, t, mask, shared)) {
        other = &c.write;
      } else if (races(c.read, t, mask, shared)) {
        other = &c.read, other_writes = false;
      } else if (races(c.reread, t, mask, shared)) {
        other = &c.reread, other_writes = false;
      }
      if (other) there = r.data + i * kGranule;
    }
    if (other) continue;
    now.state = static_cast<unsigned char>((own ? c.write.state & 3 : 0) | mask | (atomic ? 4 : 0));
    c.write = now;
    c.rewrite = 0;
    if (kind == kAsync) c.pending = static_cast<unsigned short>(t + 1);
  }
  if (!other) return;
  if (kind != kWrite) report(r, there, true, t, where, *other, other_writes);
  auto& d = m.doubt;
  d.active = true;
  d.p = p, d.bytes = bytes, d.where = where, d.thread = t;
  d.other = *other, d.other_writes = other_writes, d.in = &r;
  memcpy(d.old, p, bytes);
}

// The threads of `who` have seen what all of them have.
void join(const unsigned short* who, size_t count, unsigned low, unsigned high) {
  m.joined.assign(high - low, 0);
  unsigned* all = m.joined.data();
  for (size_t i = 0; i < count; i++) {
    row(who[i])[who[i]] = m.fibres[who[i]].clock;
    const unsigned* from = row(who[i]) + low;
    for (unsigned k = 0; k < high - low; k++) all[k] = std::max(all[k], from[k]);
  }
  for (size_t i = 0; i < count; i++) {
    memcpy(row(who[i]) + low, all, (high - low) * sizeof(unsigned));
    m.fibres[who[i]].clock++;
  }
}

// ---- accesses

region* find(const char* p) {
  auto found = buffers.upper_bound(p);
  if (found == buffers.end() || p < found->second.data) return nullptr;
  return &found->second;
}

inline bool holds(const region& r, const char* p) {
  return static_cast<size_t>(p - r.data) < r.bytes;
}

[[noreturn]] void outside(const char* p, unsigned bytes, bool write, unsigned t, unsigned where) {
  std::string what = thread_name(t) + (write ? " writes " : " reads ") + text("%u bytes", bytes) +
                     at(where) + " outside of every buffer";
  const region* near = nullptr;
  ptrdiff_t distance = 0;
  auto consider = [&](const region& r) {
    if (!r.data) return;
    ptrdiff_t d = p >= r.data + r.bytes ? p - (r.data + r.bytes) + 1 : p < r.data ? p - r.data : 0;
    if (!near || std::abs(d) < std::abs(distance)) near = &r, distance = d;
  };
  consider(m.dynamic);
  consider(m.fixed);
  auto after = buffers.upper_bound(p);
  if (after != buffers.end()) consider(after->second);
  if (after != buffers.begin()) consider(std::prev(after)->second);
  if (near && std::abs(distance) < (1 << 20)) {
    std::string name = near->kind == region::dynamic_shared ? "dynamic shared memory"
                       : near->kind == region::static_shared
                           ? "static shared memory"
                           : *near->name ? near->name : "a buffer";
    if (distance > 0) {
      what += text(": %td bytes after the end of %s of %zu bytes", distance - 1, name.c_str(),
                   near->bytes);
    } else if (distance < 0) {
      what += text(": %td bytes before %s of %zu bytes", -distance, name.c_str(), near->bytes);
    } else {
      what += text(": %zu bytes across the end of %s of %zu bytes",
                   static_cast<size_t>(p + bytes - near->data - near->bytes), name.c_str(),
                   near->bytes);
    }
  } else {
    what += text(" (address %p)", static_cast<const void*>(p));
  }
  stop(what);
}

region* region_of(char* p, unsigned bytes, bool write, unsigned t, unsigned where) {
  region* r = nullptr;
  if (holds(m.dynamic, p)) {
    r = &m.dynamic;
  } else if (holds(m.fixed, p)) {
    r = &m.fixed;
  } else if (m.last && holds(*m.last, p)) {
    r = m.last;
  } else if ((r = find(p))) {
    m.last = r;
  } else {
    if (p >= m.code.low && p < m.code.high) return nullptr;  // constants
    if (p >= m.host_low && p < m.host_high) return nullptr;  // what emulate()'s caller has
    if (buffers.empty()) return nullptr;                     // nothing was registered
    outside(p, bytes, write, t, where);
  }
  if (static_cast<size_t>(p - r->data) + bytes > r->bytes) outside(p, bytes, write, t, where);
  return r;
}

void touched(char* p, unsigned bytes, access kind, unsigned t, unsigned where) {
  if (m.doubt.active) settle();
  region* r = region_of(p, bytes, kind != kRead, t, where);
  if (r && r->cells) track(*r, p, bytes, kind, t, where);
}

void misaligned(const char* p, unsigned bytes, bool write, unsigned where) {
  stop(thread_name(m.current) + (write ? " writes" : " reads") +
       text(" %u bytes at once", bytes) + at(where) + " at an address that is not a multiple of " +
       text("%u", bytes) + text(" (it is %u more)", static_cast<unsigned>(uintptr_t(p) % bytes)));
}

template <unsigned Bytes, bool Write, bool Aligned>
inline __attribute__((always_inline)) void called(void* address, void* pc) {
  char* p = static_cast<char*>(address);
  if (static_cast<size_t>(p - m.stack) < kStack) return;
  if (!m.running) return;
  if (Aligned && Bytes > 1 && uintptr_t(p) % Bytes) misaligned(p, Bytes, Write, where_of(pc));
  touched(p, Bytes, Write ? kWrite : kRead, m.current, where_of(pc));
}

void ranged(void* address, size_t bytes, bool write, void* pc) {
  char* p = static_cast<char*>(address);
  if (static_cast<size_t>(p - m.stack) < kStack || !m.running || !bytes) return;
  unsigned where = where_of(pc);
  for (size_t i = 0; i < bytes; i += 16)
    touched(p + i, static_cast<unsigned>(std::min<size_t>(16, bytes - i)), write ? kWrite : kRead,
            m.current, where);
}

// ---- fibres

void fibre_main();

void make_ready(unsigned t) {
  m.fibres[t].now = state::ready;
  m.ready.push_back(static_cast<unsigned short>(t));
}

bool take(unsigned& t) {
  if (chosen.order == 2) {
    if (m.ready.empty()) return false;
    size_t i = uint64_t{next_random()} * m.ready.size() >> 32;
    t = m.ready[i];
    m.ready[i] = m.ready.back();
    m.ready.pop_back();
    return true;
  }
  if (m.head == m.ready.size()) {
    m.ready.clear();
    m.head = 0;
    return false;
  }
  t = m.ready[m.head++];
  return true;
}

// The current fibre waits or has ended: another one goes on.
void pass_on() {
  fibre& self = m.fibres[m.current];
  unsigned t;
  if (take(t)) {
    m.current = t;
    m.stack = m.fibres[t].stack;
    if (&m.fibres[t] != &self) switch_context(self.where, m.fibres[t].where);
  } else {
    switch_context(self.where, m.scheduler);
  }
}

void release(barrier& b) {
  b.result = b.predicates;
  std::vector<unsigned short> who;
  who.swap(b.waiting);
  if (chosen.order == 1) std::sort(who.begin(), who.end(), std::greater<>());
  if (chosen.order == 0) std::sort(who.begin(), who.end());
  if (m.seen.size()) {
    if (b.partial) {
      join(who.data(), who.size(), 0, m.threads);
      m.crossed = true;
    } else {
      m.epoch++;
      m.crossed = false;
    }
  }
  b.arrived = b.expected = 0;
  b.predicates = 0;
  for (unsigned short t : who)
    if (m.fibres[t].now == state::barrier && &m.barriers[m.fibres[t].barrier] == &b) make_ready(t);
}

void fibre_main() {
  m.body(m.argument);
  if (m.doubt.active) settle();
  fibre& self = m.fibres[m.current];
  if (m.dependent && !self.waited)
    stop(thread_name(m.current) + " of a dependent launch ends without grid_dependency_wait");
  self.now = state::done;
  m.live--;
  for (barrier& b : m.barriers)
    if (b.arrived && !b.partial && b.arrived == m.live) release(b);
  pass_on();
  abort();  // nothing resumes a fibre that has ended
}

void prepare(unsigned threads) {
  if (m.fibres.size() < threads) {
    if (m.stacks) munmap(m.stacks, m.stacks_bytes);
    m.stacks_bytes = threads * kStack;
    void* p = mmap(nullptr, m.stacks_bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) abort();
    m.stacks = static_cast<char*>(p);
    m.fibres.resize(threads);
    for (unsigned i = 0; i < threads; i++) {
      m.fibres[i].stack = m.stacks + i * kStack;
      mprotect(m.fibres[i].stack, 4096, PROT_NONE);  // below each stack
    }
  }
  if (!m.dynamic.data) {
    void* p = mmap(nullptr, kMostShared + 4096, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) abort();
    m.dynamic.data = static_cast<char*>(p) + kSharedAt;
    m.dynamic.kind = region::dynamic_shared;
    m.fixed.kind = region::static_shared;
  }
}

cell* make_cells(size_t bytes) {
  void* p = mmap(nullptr, (bytes / kGranule + 2) * sizeof(cell), PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? nullptr : static_cast<cell*>(p);
}

extern "C" void* __tls_get_addr(void*);

// Where the code that holds `key` lies, and its TLS segment.
void find_library(const void* key) {
  if (m.code.key == key) return;
  m.code = {};
  m.code.key = key;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void*) {
        auto base = reinterpret_cast<char*>(info->dlpi_addr);
        char *low = nullptr, *high = nullptr;
        size_t tls = 0;
        for (int i = 0; i < info->dlpi_phnum; i++) {
          const auto& h = info->dlpi_phdr[i];
          if (h.p_type == PT_TLS) tls = h.p_memsz;
          if (h.p_type != PT_LOAD) continue;
          char* from = base + h.p_vaddr;
          if (!low || from < low) low = from;
          high = std::max(high, from + h.p_memsz);
        }
        auto* key = static_cast<const char*>(m.code.key);
        if (key < low || key >= high) return 0;
        // Offsets of code are taken from the load address, as addr2line wants them.
        m.code.low = base ? base : low;
        m.code.high = high;
        m.code.tls_module = info->dlpi_tls_modid;
        m.code.tls_bytes = tls;
        m.code.path = info->dlpi_name;
        if (m.code.path.empty()) {  // the program itself
          char name[4096];
          ssize_t n = readlink("/proc/self/exe", name, sizeof name);
          m.code.path.assign(name, n > 0 ? static_cast<size_t>(n) : 0);
        }
        return 1;
      },
      nullptr);
}

const char* who_waits(std::string& what) {
  unsigned n = 0;
  for (unsigned t = 0; t < m.threads && n < 3; t++) {
    const fibre& f = m.fibres[t];
    if (f.now == state::done || f.now == state::ready) continue;
    // The first of each kind of wait.
    bool said = false;
    for (unsigned u = 0; u < t; u++)
      said |= m.fibres[u].now == f.now && m.fibres[u].at.line == f.at.line;
    if (said) continue;
    what += (n++ ? "; " : "") + thread_name(t) + " waits in ";
    if (f.now == state::barrier) {
      const barrier& b = m.barriers[f.barrier];
      what += text("a barrier%s, %u of %u threads have come", at(f.at).c_str(), b.arrived,
                   b.partial ? b.expected : m.live);
      continue;
    }
    if (f.now == state::blocked) {
      what += f.blocked + at(f.at);
      continue;
    }
    unsigned warp = t / 32, there = 0;
    std::string others;
    for (unsigned lane = 0; lane < 32; lane++) {
      if (!(f.mask >> lane & 1)) continue;
      unsigned u = warp * 32 + lane;
      bool exists = u < m.threads;
      const fibre* g = exists ? &m.fibres[u] : nullptr;
      if (g && g->now == state::warp && g->kind == f.kind && g->mask == f.mask) {
        there++;
      } else if (others.empty()) {
        others = text(", lane %u", lane) +
                 (!exists                       ? " does not exist"
                  : g->now == state::done       ? " has ended"
                  : g->now == state::barrier    ? " waits in a barrier" + at(g->at)
                  : g->now == state::blocked    ? std::string(" waits in ") + g->blocked + at(g->at)
                  : g->now == state::warp       ? std::string(" is in ") + kKinds[g->kind] +
                                                text(" of mask 0x%x", g->mask) + at(g->at)
                                                : " does not come");
      }
    }
    what += kKinds[f.kind] + text(" of mask 0x%x", f.mask) + at(f.at) +
            text(": %u of its %d lanes have come", there, __builtin_popcount(f.mask)) + others;
  }
  return what.c_str();
}

void run_block() {
  if (m.dynamic.bytes) memset(m.dynamic.data, 0xFF, m.dynamic.bytes);
  if (m.fixed.bytes) memset(m.fixed.data, 0xFF, m.fixed.bytes);
  m.live = m.threads;
  m.ready.clear();
  m.head = 0;
  m.acquired = false;
  m.crossed = false;
  m.doubt.active = false;
  m.block_epoch = ++m.epoch;
  if (!m.seen.empty()) std::fill(m.seen.begin(), m.seen.end(), 0u);
  memset(m.waiting, 0, sizeof m.waiting);
  for (barrier& b : m.barriers) b.arrived = b.expected = 0, b.predicates = 0, b.waiting.clear();
  for (unsigned i = 0; i < m.threads; i++) {
    fibre& f = m.fibres[i];
    // Frames of different fibres would share cache sets if all stacks began alike.
    start_context(f.where, f.stack, kStack - (i * 448) % 16384, fibre_main);
    f.at = {};
    f.clock = 1;
    f.groups.clear();
    f.open.clear();
    f.handed.clear();
    f.finished = 0;
    f.atomics = 0;
    f.waited = false;
    make_ready(chosen.order == 1 ? m.threads - 1 - i : i);
  }
  unsigned t;
  take(t);
  m.current = t;
  m.stack = m.fibres[t].stack;
  m.running = true;
  switch_context(m.scheduler, m.fibres[t].where);
  m.running = false;
  m.stack = nullptr;
  if (m.fault.empty() && m.live) {
    std::string what;
    who_waits(what);
    m.fault = std::string(m.name) + ", " + block_name(m.block_number) +
              ", divergent barriers: nobody can go on: " + what;
  }
}

}  // namespace

extern "C" {

[[noreturn]] void emu_fault(const char* what, const char* file, int line);

#define EMU_EXPORT __attribute__((visibility("default")))
#define EMU_PC __builtin_return_address(0)

// ---- called by the compiler's instrumentation

#define EMU_CALLBACKS(n, aligned)                                                         \
  EMU_EXPORT void __tsan_read##n(void* p) { called<n, false, true>(p, EMU_PC); }          \
  EMU_EXPORT void __tsan_write##n(void* p) { called<n, true, true>(p, EMU_PC); }          \
  EMU_EXPORT void __tsan_volatile_read##n(void* p) { called<n, false, true>(p, EMU_PC); } \
  EMU_EXPORT void __tsan_volatile_write##n(void* p) { called<n, true, true>(p, EMU_PC); } \
  EMU_EXPORT void __tsan_unaligned_read##n(void* p) { called<n, false, false>(p, EMU_PC); } \
  EMU_EXPORT void __tsan_unaligned_write##n(void* p) { called<n, true, false>(p, EMU_PC); } \
  EMU_EXPORT void __tsan_read_write##n(void* p) {                                         \
    called<n, false, true>(p, EMU_PC);                                                    \
    called<n, true, true>(p, EMU_PC);                                                     \
  }                                                                                       \
  EMU_EXPORT void __tsan_unaligned_read_write##n(void* p) {                               \
    called<n, false, false>(p, EMU_PC);                                                   \
    called<n, true, false>(p, EMU_PC);                                                    \
  }
EMU_CALLBACKS(1, true)
EMU_CALLBACKS(2, true)
EMU_CALLBACKS(4, true)
EMU_CALLBACKS(8, true)
EMU_CALLBACKS(16, true)
EMU_EXPORT void __tsan_read_range(void* p, size_t n) { ranged(p, n, false, EMU_PC); }
EMU_EXPORT void __tsan_write_range(void* p, size_t n) { ranged(p, n, true, EMU_PC); }
EMU_EXPORT void* __tsan_memcpy(void* to, const void* from, size_t n) {
  ranged(const_cast<void*>(from), n, false, EMU_PC);
  ranged(to, n, true, EMU_PC);
  return memcpy(to, from, n);
}
EMU_EXPORT void* __tsan_memmove(void* to, const void* from, size_t n) {
  ranged(const_cast<void*>(from), n, false, EMU_PC);
  ranged(to, n, true, EMU_PC);
  return memmove(to, from, n);
}
EMU_EXPORT void* __tsan_memset(void* to, int value, size_t n) {
  ranged(to, n, true, EMU_PC);
  return memset(to, value, n);
}
EMU_EXPORT void __tsan_func_entry(void*) {}
EMU_EXPORT void __tsan_func_exit() {}
EMU_EXPORT void __tsan_init() {}
EMU_EXPORT void __tsan_vptr_update(void**, void*) {}
EMU_EXPORT void __tsan_vptr_read(void**) {}

// ---- called by include/

EMU_EXPORT emu_index emu_thread_idx() {
  unsigned t = m.current, x = m.block.x, y = m.block.y;
  if (y == 1 && m.block.z == 1) return {t, 0, 0};
  return {t % x, t / x % y, t / (x * y)};
}
EMU_EXPORT emu_index emu_block_idx() { return m.at; }
EMU_EXPORT emu_index emu_block_dim() { return m.block; }
EMU_EXPORT emu_index emu_grid_dim() { return m.grid; }
EMU_EXPORT unsigned emu_lane() { return m.current % 32; }
EMU_EXPORT unsigned emu_live_lanes() {
  unsigned first = m.current / 32 * 32, mask = 0;
  for (unsigned i = first; i < std::min(first + 32, m.threads); i++)
    if (m.fibres[i].now != state::done) mask |= 1u << (i - first);
  return mask;
}
EMU_EXPORT unsigned char* emu_dynamic_shared() {
  return reinterpret_cast<unsigned char*>(m.dynamic.data);
}
EMU_EXPORT unsigned emu_dynamic_shared_bytes() { return static_cast<unsigned>(m.dynamic.bytes); }

[[noreturn]] EMU_EXPORT void emu_fault(const char* what, const char* file, int line) {
  site here{file, line};
  if (!*file) here = m.fibres[m.current].at;
  stop(thread_name(m.current) + ": " + what + at(here));
}

EMU_EXPORT int emu_barrier(unsigned id, unsigned count, int predicate, int arrive_only,
                           const char* file, int line) {
  if (m.doubt.active) settle();
  if (id >= 16) emu_fault("no such barrier", file, line);
  fibre& self = m.fibres[m.current];
  barrier& b = m.barriers[id];
  site here{file, line};
  bool partial = count != 0 && count != m.threads;
  if (!b.arrived) {
    b.at = here;
    b.expected = count;
    b.partial = partial;
  } else if (count == 0 && (b.at.line != line ||
                            (b.at.file != file && strcmp(b.at.file, file) != 0))) {
    stop("divergent barriers: " + thread_name(b.waiting.empty() ? 0 : b.waiting[0]) + " waits" +
         at(b.at) + ", " + thread_name(m.current) + at(here));
  } else if (b.expected != count) {
    emu_fault("comes to a barrier with another count than those who wait", file, line);
  }
  b.arrived++;
  b.predicates += predicate != 0;
  b.waiting.push_back(static_cast<unsigned short>(m.current));
  self.at = here;
  self.barrier = id;
  if (!arrive_only) self.now = state::barrier;
  if (b.arrived == (partial ? count : m.live)) {
    // What the barrier releases has the result of this round, not of the next.
    release(b);
    if (arrive_only) return 0;
    pass_on();
    return b.result;
  }
  if (arrive_only) return 0;
  pass_on();
  return b.result;
}

EMU_EXPORT void emu_collective(int kind, unsigned mask, void* request,
                               void (*combine)(void* const*, unsigned), const char* file,
                               int line) {
  if (m.doubt.active) settle();
  unsigned first = m.current / 32 * 32, lane = m.current % 32;
  fibre& self = m.fibres[m.current];
  self.at = {file, line};
  if (!(mask >> lane & 1)) {
    stop(thread_name(m.current) + " (lane " + text("%u", lane) + ") is not in the mask " +
         text("0x%x of %s", mask, kKinds[kind]) + at(self.at));
  }
  self.now = state::warp;
  self.kind = kind;
  self.mask = mask;
  self.request = request;
  void* requests[32] = {};
  unsigned char& waiting = m.waiting[m.current / 32];
  bool all = ++waiting >= __builtin_popcount(mask);
  for (unsigned i = 0; i < 32 && all; i++) {
    if (!(mask >> i & 1)) continue;
    if (first + i >= m.threads) {
      all = false;
      break;
    }
    const fibre& f = m.fibres[first + i];
    all = f.now == state::warp && f.kind == kind && f.mask == mask;
    requests[i] = f.request;
  }
  if (!all) {
    pass_on();
    return;
  }
  if (combine) combine(requests, mask);
  if (kind == 2 && !m.seen.empty()) {  // the only one that orders memory
    unsigned short who[32];
    size_t count = 0;
    for (unsigned i = 0; i < 32; i++)
      if (mask >> i & 1) who[count++] = static_cast<unsigned short>(first + i);
    if (m.crossed) {
      join(who, count, 0, m.threads);
    } else {
      join(who, count, first, std::min(first + 32, m.threads));
    }
  }
  waiting = static_cast<unsigned char>(waiting - __builtin_popcount(mask));
  self.now = state::ready;
  for (unsigned i = 0; i < 32; i++) {
    unsigned n = chosen.order == 1 ? 31 - i : i;
    if (mask >> n & 1 && n != lane) make_ready(first + n);
  }
}

EMU_EXPORT void emu_access(const void* p, unsigned bytes, int write, int lane) {
  unsigned t = lane < 0 ? m.current : m.current / 32 * 32 + static_cast<unsigned>(lane);
  char* from = static_cast<char*>(const_cast<void*>(p));
  unsigned where = m.fibres[t].at.file ? number_of(m.fibres[t].at) : 0;
  for (unsigned i = 0; i < bytes; i += 16)
    touched(from + i, std::min(16u, bytes - i), write ? kWrite : kRead, t, where);
}

EMU_EXPORT void emu_pause() {
  if (m.doubt.active) settle();
  if (!m.running) return;
  fibre& self = m.fibres[m.current];
  if (++self.atomics > 1000000) emu_fault("spins for ever", "", 0);
  make_ready(m.current);
  pass_on();
}

EMU_EXPORT void emu_atomic(const void* address, unsigned bytes) {
  char* p = static_cast<char*>(const_cast<void*>(address));
  if (!m.running || static_cast<size_t>(p - m.stack) < kStack) return;
  unsigned where = where_of(EMU_PC);
  if (uintptr_t(p) % bytes) misaligned(p, bytes, true, where);
  touched(p, bytes, kAtomic, m.current, where);
  if (find(p) || (p >= m.code.low && p < m.code.high)) m.acquired = true;
  if (++m.fibres[m.current].atomics % 64 == 0) emu_pause();
}

EMU_EXPORT void emu_fence(int block_only) {
  if (m.doubt.active) settle();
  if (!block_only && m.block_number < m.fenced.size()) m.fenced[m.block_number] = 1;
}

EMU_EXPORT void emu_dependency_wait() {
  if (m.doubt.active) settle();
  if (m.running) m.fibres[m.current].waited = true;
}
// Whether the next launch may begin before those before it have ended.
EMU_EXPORT void emu_dependent(int on) { m.next_is_dependent = on != 0; }

EMU_EXPORT unsigned emu_shared_address(const void* address, const char* file, int line) {
  auto* p = static_cast<const char*>(address);
  if (p >= m.dynamic.data && p <= m.dynamic.data + m.dynamic.bytes)
    return kSharedAt + static_cast<unsigned>(p - m.dynamic.data);
  // Behind it, with the alignment that it has.
  unsigned behind = kSharedAt + static_cast<unsigned>(m.dynamic.bytes);
  unsigned base = (behind + 1023) / 1024 * 1024 + static_cast<unsigned>(uintptr_t(m.fixed.data) % 1024);
  if (m.fixed.data && p >= m.fixed.data && p <= m.fixed.data + m.fixed.bytes)
    return base + static_cast<unsigned>(p - m.fixed.data);
  emu_fault("takes the shared address of what isn't in shared memory", file, line);
}

EMU_EXPORT void* emu_from_shared(unsigned address) {
  unsigned behind = kSharedAt + static_cast<unsigned>(m.dynamic.bytes);
  unsigned base = (behind + 1023) / 1024 * 1024 + static_cast<unsigned>(uintptr_t(m.fixed.data) % 1024);
  if (address >= base) return m.fixed.data + (address - base);
  return m.dynamic.data + (static_cast<ptrdiff_t>(address) - static_cast<ptrdiff_t>(kSharedAt));
}

EMU_EXPORT void emu_copy_async(void* shared, const void* global, unsigned bytes,
                               unsigned source_bytes, const char* file, int line) {
  fibre& self = m.fibres[m.current];
  self.at = {file, line};
  unsigned where = number_of(self.at);
  char* to = static_cast<char*>(shared);
  char* from = static_cast<char*>(const_cast<void*>(global));
  if (uintptr_t(to) % bytes) misaligned(to, bytes, true, where);
  copy c{to, bytes, where, {}};
  if (source_bytes) {
    if (uintptr_t(from) % bytes) misaligned(from, bytes, false, where);
    touched(from, source_bytes, kRead, m.current, where);
    memcpy(c.data, from, source_bytes);
  }
  if (!holds(m.dynamic, to) && !holds(m.fixed, to))
    emu_fault("an asynchronous copy to what isn't shared memory", file, line);
  touched(to, bytes, kAsync, m.current, where);
  memset(to, 0xFF, bytes);  // until it is waited for
  self.open.push_back(c);
}

EMU_EXPORT void emu_copy_commit() {
  fibre& self = m.fibres[m.current];
  self.groups.emplace_back(std::move(self.open));
  self.open.clear();
}

// Copies of a thread that were handed over, up to the `count`-th, are there.
void emu_finish_handed(unsigned t, size_t count) {
  fibre& f = m.fibres[t];
  for (; f.finished < count; f.finished++) {
    const copy& c = f.handed[f.finished];
    memcpy(c.to, c.data, c.bytes);
    region* r = holds(m.dynamic, c.to) ? &m.dynamic : &m.fixed;
    if (!r->cells) continue;
    size_t first = static_cast<size_t>(c.to - r->data) / kGranule;
    for (size_t i = 0; i < c.bytes / kGranule; i++) r->cells[first + i].pending = 0;
  }
}
// All copies that the current thread has begun; their number, for emu_finish_handed.
size_t emu_hand_over() {
  fibre& self = m.fibres[m.current];
  for (auto& group : self.groups) self.handed.insert(self.handed.end(), group.begin(), group.end());
  self.handed.insert(self.handed.end(), self.open.begin(), self.open.end());
  self.groups.clear();
  self.open.clear();
  return self.handed.size();
}

EMU_EXPORT void emu_copy_wait(unsigned pending) {
  if (m.doubt.active) settle();
  fibre& self = m.fibres[m.current];
  if (!pending) emu_finish_handed(m.current, self.handed.size());
  while (self.groups.size() > pending) {
    for (const copy& c : self.groups.front()) {
      memcpy(c.to, c.data, c.bytes);
      region* r = holds(m.dynamic, c.to) ? &m.dynamic : &m.fixed;
      if (!r->cells) continue;
      size_t first = static_cast<size_t>(c.to - r->data) / kGranule;
      for (size_t i = 0; i < c.bytes / kGranule; i++) r->cells[first + i].pending = 0;
      touched(c.to, c.bytes, kWrite, m.current, c.where);
      m.doubt.active = false;
    }
    self.groups.erase(self.groups.begin());
  }
}

// ---- for core/hopper.cc

// Until emu_wake: `what` it waits for, in words.
void emu_block(const char* what, const char* file, int line) {
  if (m.doubt.active) settle();
  fibre& self = m.fibres[m.current];
  self.at = {file, line};
  self.blocked = what;
  self.now = state::blocked;
  pass_on();
}
void emu_wake(unsigned t) { make_ready(t); }
unsigned emu_thread() { return m.current; }
unsigned emu_block_serial() { return m.block_epoch; }
void emu_here(const char* file, int line) { m.fibres[m.current].at = {file, line}; }
void emu_settle() {
  if (m.doubt.active) settle();
}

// What the current thread has done and seen becomes part of `clocks`; of them, a part of it.
void emu_clocks_give(std::vector<unsigned>& clocks) {
  if (m.seen.empty()) return;
  clocks.resize(m.threads, 0);
  unsigned t = m.current;
  row(t)[t] = m.fibres[t].clock++;
  for (unsigned i = 0; i < m.threads; i++) clocks[i] = std::max(clocks[i], row(t)[i]);
}
void emu_clocks_take(const std::vector<unsigned>& clocks) {
  if (m.seen.empty() || clocks.empty()) return;
  unsigned* own = row(m.current);
  for (unsigned i = 0; i < m.threads; i++) own[i] = std::max(own[i], clocks[i]);
  m.crossed = true;
}

// Memory that an asynchronous write of the current thread will fill, until emu_async_end.
void emu_async_begin(void* shared, unsigned bytes, const char* file, int line) {
  char* to = static_cast<char*>(shared);
  m.fibres[m.current].at = {file, line};
  unsigned where = number_of({file, line});
  if (!holds(m.dynamic, to) && !holds(m.fixed, to))
    emu_fault("an asynchronous copy to what isn't shared memory", file, line);
  for (unsigned i = 0; i < bytes; i += 16) touched(to + i, 16, kAsync, m.current, where);
  memset(to, 0xFF, bytes);  // until it is waited for
}
void emu_async_end(void* shared, unsigned bytes) {
  char* to = static_cast<char*>(shared);
  region* r = holds(m.dynamic, to) ? &m.dynamic : &m.fixed;
  if (!r->cells) return;
  size_t first = static_cast<size_t>(to - r->data) / kGranule;
  for (size_t i = 0; i < bytes / kGranule; i++) r->cells[first + i].pending = 0;
}

// ---- memory of the device

EMU_EXPORT void emu_register(const void* p, size_t bytes, const char* name) {
  auto* data = static_cast<char*>(const_cast<void*>(p));
  region r;
  r.data = data;
  r.bytes = bytes;
  r.name = name;
  r.kind = region::buffer;
  buffers[data + bytes] = r;
  m.last = nullptr;
}

EMU_EXPORT void emu_forget(const void* p) {
  region* r = find(static_cast<const char*>(p));
  if (!r) return;
  if (r->cells) munmap(r->cells, (r->bytes / kGranule + 2) * sizeof(cell));
  buffers.erase(r->data + r->bytes);
  m.last = nullptr;
}

// Addresses are not used again, so that a pointer to what was freed is noticed.
EMU_EXPORT void* emu_allocate(size_t bytes, const char* name) {
  if (!arena) {
    void* p = mmap(nullptr, kArena, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) return nullptr;
    arena = static_cast<char*>(p) + kGap;
  }
  // One byte at least: an empty buffer, too, has an address of its own.
  size_t size = std::max<size_t>(bytes, 1);
  size_t taken = (size + 4095) / 4096 * 4096 + kGap;
  if (arena_used + taken + kGap > kArena) return nullptr;
  char* p = arena + arena_used;
  arena_used += taken;
  memset(p, 0xFF, size);  // NaN, or -1
  emu_register(p, size, name);
  buffers[p + size].owned = true;
  allocated += bytes;
  peak = std::max(peak, allocated);
  return p;
}

EMU_EXPORT int emu_is_buffer(const void* p, size_t bytes) {
  region* r = find(static_cast<const char*>(p));
  return r && static_cast<size_t>(static_cast<const char*>(p) - r->data) + bytes <= r->bytes;
}

EMU_EXPORT void emu_release(void* p) {
  region* r = find(static_cast<char*>(p));
  if (!r || r->data != p || !r->owned) return;
  allocated -= std::min(allocated, r->bytes);
  size_t size = (r->bytes + 4095) / 4096 * 4096;
  emu_forget(p);
  madvise(p, size, MADV_DONTNEED);
}

EMU_EXPORT size_t emu_peak_bytes() { return peak; }

EMU_EXPORT void emu_options(int order, unsigned seed, int races, unsigned max_threads,
                            unsigned max_shared) {
  chosen = {order, seed, races != 0, max_threads, max_shared};
}

// ---- launches

// What is wrong with the kernel, or "".
EMU_EXPORT const char* emu_launch(const char* name, const unsigned* grid, const unsigned* block,
                                  unsigned shared_bytes, void (*thread)(void*), void* argument,
                                  const void* library_key) {
  m.fault.clear();
  m.said.clear();
  m.name = name;
  m.grid = {grid[0], grid[1], grid[2]};
  m.block = {block[0], block[1], block[2]};
  uint64_t threads = uint64_t{block[0]} * block[1] * block[2];
  uint64_t blocks = uint64_t{grid[0]} * grid[1] * grid[2];
  find_library(library_key);
  if (threads > chosen.max_threads || threads > 1024) {
    m.said = text("%s: %llu threads in a block, the limit is %u", name,
                  static_cast<unsigned long long>(threads), std::min(chosen.max_threads, 1024u));
    return m.said.c_str();
  }
  if (shared_bytes + m.code.tls_bytes > chosen.max_shared) {
    m.said = text("%s: %zu bytes of shared memory in a block, the limit is %u", name,
                  shared_bytes + m.code.tls_bytes, chosen.max_shared);
    return m.said.c_str();
  }
  if (grid[1] > 65535 || grid[2] > 65535) {
    m.said = text("%s: a grid of (%u, %u, %u), the limit in y and z is 65535", name, grid[0],
                  grid[1], grid[2]);
    return m.said.c_str();
  }
  if (!threads || !blocks) return "";
  static bool environment = false;
  if (!environment) {  // of a test program; a device sets its options afterwards
    environment = true;
    if (getenv("MLC_EMU_RACES")) chosen.races = true;
    if (const char* seed = getenv("MLC_EMU_SEED")) chosen.seed = static_cast<unsigned>(atoi(seed));
  }
  m.threads = static_cast<unsigned>(threads);
  prepare(m.threads);
  m.body = thread;
  m.argument = argument;
  m.dynamic.bytes = shared_bytes;
  m.fixed.data = nullptr;
  m.fixed.bytes = 0;
  if (m.code.tls_bytes) {
    struct {
      size_t module, offset;
    } index = {m.code.tls_module, 0};
    m.fixed.data = static_cast<char*>(__tls_get_addr(&index));
    m.fixed.bytes = m.code.tls_bytes;
  }
  pthread_attr_t attributes;
  if (!m.host_low && pthread_getattr_np(pthread_self(), &attributes) == 0) {
    void* low;
    size_t bytes;
    pthread_attr_getstack(&attributes, &low, &bytes);
    m.host_low = static_cast<char*>(low);
    m.host_high = m.host_low + bytes;
    pthread_attr_destroy(&attributes);
  }
  static cell *dynamic_cells = nullptr, *fixed_cells = nullptr;
  if (m.epoch > 0xF0000000) {  // 32 bits of intervals have passed: nothing is remembered
    m.epoch = 0;
    for (auto& [end, r] : buffers)
      if (r.cells) munmap(r.cells, (r.bytes / kGranule + 2) * sizeof(cell)), r.cells = nullptr;
    for (cell* cells : {dynamic_cells, fixed_cells})
      if (cells) std::fill_n(cells, kMostShared / kGranule, cell{});
  }
  if (chosen.races) {
    if (!dynamic_cells) dynamic_cells = make_cells(kMostShared), fixed_cells = make_cells(kMostShared);
    m.seen.assign(size_t{m.threads} * m.threads, 0);
    for (auto& [end, r] : buffers)
      if (!r.cells && r.bytes <= kMostTracked) r.cells = make_cells(r.bytes);
  } else {
    m.seen.clear();
    for (auto& [end, r] : buffers)
      if (r.cells) munmap(r.cells, (r.bytes / kGranule + 2) * sizeof(cell)), r.cells = nullptr;
  }
  m.dynamic.cells = chosen.races ? dynamic_cells : nullptr;
  m.fixed.cells = chosen.races ? fixed_cells : nullptr;
  m.fenced.assign(chosen.races ? blocks : 0, 0);
  m.launch_epoch = ++m.epoch;
  m.dependent = m.next_is_dependent;
  m.next_is_dependent = false;
  if (!m.dependent) {
    m.stable_epoch = m.launch_epoch;
    m.launches.clear();
  }
  m.launches[m.launch_epoch] = name;
  m.last = nullptr;
  for (uint64_t n = 0; n < blocks && m.fault.empty(); n++) {
    uint64_t b = chosen.order == 1 ? blocks - 1 - n : n;
    m.block_number = static_cast<unsigned>(b);
    m.at = {static_cast<unsigned>(b % grid[0]), static_cast<unsigned>(b / grid[0] % grid[1]),
            static_cast<unsigned>(b / (uint64_t{grid[0]} * grid[1]))};
    m.random = (uint64_t{chosen.seed} * 0x9E3779B97F4A7C15u) ^ (b * 0xD1B54A32D192ED03u + 0x2545F491);
    if (!m.random) m.random = 1;
    run_block();
  }
  m.dynamic.bytes = 0;
  m.said = m.fault;
  return m.said.c_str();
}

}  // extern "C"
