// Runs the threads of a threadgroup as fibres, one group after the other on each worker.
//
// A fibre runs until a barrier or its end and hands over to the next one; when all have stopped,
// the scheduler looks whether they stopped at the same barrier. A kernel without barriers and SIMD
// functions needs one fibre, which loops over the threads.
#include "fibre.h"

#include <switch.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <thread>


namespace {

using msl::touch;
using msl::cell;
using msl::kLanes;

constexpr size_t kStack = 256 << 10;  // with native.py's limit on frames
constexpr size_t kGroupMemory = 64 << 10;

using emu::context;
using emu::start_context;
using emu::switch_context;

// ---- options

struct options {
  int order = 0;  // 0 ascending, 1 descending, 2 shuffled anew for each group
  unsigned seed = 0;
  unsigned workers = 1;
  unsigned max_threads = 1024;
} settings;

std::atomic<unsigned> epochs{1};  // never zero: that is "no access"

enum class stop { running, barrier, simd, done };

struct fibre {
  context where{};
  char* stack = nullptr;
  stop state = stop::running;
  unsigned line = 0;
};

// One OS thread's part of a launch.
struct worker {
  const msl::kernel* kernel = nullptr;
  msl::group group{};
  context scheduler{};
  std::vector<fibre> fibres;
  std::vector<unsigned> order;
  std::mt19937 random;
  unsigned current = 0;   // thread of the group
  unsigned position = 0;  // in the order
  char* memory = nullptr;
  char* stacks = nullptr;
  size_t stacks_bytes = 0;
  std::string fault;
  char slots[1024][16];
  unsigned char active[1024];
  // The race check.
  std::vector<cell> cells;
  unsigned long long first_thread = 0;  // of this group, in the grid
  unsigned group_epoch = 0, epoch = 0, device_epoch = 0, launch_epoch = 0, meetings = 0;
  unsigned simd_epoch[1024 / kLanes] = {};
  unsigned simd_device_epoch[1024 / kLanes] = {};

  ~worker() {
    free(memory);
    if (stacks) munmap(stacks, stacks_bytes);
  }
  void prepare(unsigned threads);
  bool run();
  void run_group();
  [[noreturn]] void raise(std::string what);
  std::string place(unsigned thread) const;
};

#if defined(__GLIBC__)
__attribute__((tls_model("initial-exec")))
#endif
thread_local worker* self = nullptr;

std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string text(const char* format, ...) {
  char buffer[1024];
  va_list args;
  va_start(args, format);
  vsnprintf(buffer, sizeof buffer, format, args);
  va_end(args);
  return buffer;
}

std::string at_line(unsigned line) { return line ? text(" (line %u)", line) : std::string(); }

std::string worker::place(unsigned t) const {
  const unsigned* b = group.block;
  return text("thread (%u, %u, %u)", t % b[0], t / b[0] % b[1], t / (b[0] * b[1]));
}

void worker::raise(std::string what) {
  const unsigned* g = group.at;
  fault = text("%s, threadgroup (%u, %u, %u), ", kernel->name, g[0], g[1], g[2]) +
          place(current) + ": " + what;
  context dead{};
  switch_context(dead, scheduler);
  abort();
}

// The current fibre stops; the next one that may run goes on.
void pass_on(worker& w, stop state, unsigned line) {
  fibre& me = w.fibres[w.current];
  unsigned thread = w.current;
  me.state = state;
  me.line = line;
  while (++w.position < w.group.threads) {
    unsigned next = w.order[w.position];
    if (w.fibres[next].state != stop::running) continue;
    w.current = next;
    switch_context(me.where, w.fibres[next].where);
    w.current = thread;
    return;
  }
  switch_context(me.where, w.scheduler);
  w.current = thread;
}

void fibre_main() {
  worker& w = *self;
  if (w.kernel->fibres) {
    w.kernel->one(w.group, w.current);
    pass_on(w, stop::done, 0);
  } else {
    w.kernel->all(w.group);
    switch_context(w.fibres[0].where, w.scheduler);
  }
  abort();  // nothing resumes a fibre that has ended
}

void worker::prepare(unsigned threads) {
  unsigned count = kernel->fibres ? threads : 1;
  if (fibres.size() < count) {
    if (stacks) munmap(stacks, stacks_bytes);
    // A page of no access below each stack.
    stacks_bytes = count * kStack;
    void* p = mmap(nullptr, stacks_bytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) abort();
    stacks = static_cast<char*>(p);
    fibres.resize(count);
    for (unsigned i = 0; i < count; i++) {
      fibres[i].stack = stacks + i * kStack;
      mprotect(fibres[i].stack, 4096, PROT_NONE);
    }
  }
  if (!memory && posix_memalign(reinterpret_cast<void**>(&memory), 256, kGroupMemory)) abort();
  order.resize(threads);
  std::iota(order.begin(), order.end(), 0u);
  if (settings.order == 1) std::reverse(order.begin(), order.end());
  if (kernel->mode >= 2) cells.resize(kGroupMemory / kernel->granule);
}

void worker::run_group() {
  unsigned n = group.threads;
  // What no thread has written is NaN, or -1.
  if (kernel->group_bytes) memset(memory, 0xFF, kernel->group_bytes);
  if (settings.order == 2) {
    std::iota(order.begin(), order.end(), 0u);
    std::shuffle(order.begin(), order.end(), random);
  }
  group.order = settings.order ? order.data() : nullptr;
  if (kernel->mode >= 2) group_epoch = epoch = device_epoch = meetings = ++epochs;
  unsigned count = kernel->fibres ? n : 1;
  for (unsigned i = 0; i < count; i++) {
    fibre& f = fibres[i];
    // Frames of different fibres would share cache sets if all stacks began alike.
    start_context(f.where, f.stack, kStack - (i * 448) % 16384, fibre_main);
    f.state = stop::running;
    f.line = 0;
  }
  for (;;) {
    position = 0;
    if (kernel->fibres) {
      while (position < n && fibres[order[position]].state != stop::running) position++;
      current = order[position];
    } else {
      current = 0;
    }
    switch_context(scheduler, fibres[current].where);
    if (!fault.empty()) return;
    if (!kernel->fibres) return;
    unsigned done = 0, barrier = 0;
    for (unsigned i = 0; i < n; i++) {
      done += fibres[i].state == stop::done;
      barrier += fibres[i].state == stop::barrier;
    }
    if (done == n) return;
    if (barrier == n) {
      unsigned line = fibres[0].line & 0xFFFFFF, flags = fibres[0].line >> 24;
      for (unsigned i = 1; i < n; i++)
        if (fibres[i].line != fibres[0].line) {
          fault = text("%s, threadgroup (%u, %u, %u): divergent barriers: ", kernel->name,
                       group.at[0], group.at[1], group.at[2]) +
                  place(0) + text(" waits in line %u, ", line) + place(i) +
                  text(" in line %u", fibres[i].line & 0xFFFFFF);
          return;
        }
      for (unsigned i = 0; i < n; i++) fibres[i].state = stop::running;
      if (kernel->mode >= 2) {
        meetings = ++epochs;
        if (flags & 2) epoch = meetings;
        if (flags & 1) device_epoch = meetings;
      }
      continue;
    }
    // SIMD groups of which every lane waits in the same line go on; if none does, the lanes in the
    // first line of each.
    bool moved = false;
    for (int partial = 0; partial < 2 && !moved; partial++)
      for (unsigned g = 0; g < n; g += kLanes) {
        unsigned end = std::min(n, g + kLanes), waiting = 0, first = 0;
        for (unsigned i = g; i < end; i++)
          if (fibres[i].state == stop::simd) {
            if (!waiting || (fibres[i].line & 0xFFFFFF) < (first & 0xFFFFFF)) first = fibres[i].line;
            waiting++;
          }
        if (!waiting) continue;
        unsigned meets = 0;
        for (unsigned i = g; i < end; i++)
          meets += fibres[i].state == stop::simd && fibres[i].line == first;
        bool whole = meets == end - g;
        if (!whole && !partial) continue;
        unsigned flags = first >> 24;
        if (!whole && (flags & (8 | 32))) {
          fault = text("%s, threadgroup (%u, %u, %u): %u of the %u lanes of a SIMD group meet at "
                       "the %s in line %u",
                       kernel->name, group.at[0], group.at[1], group.at[2], meets, end - g,
                       flags & 8 ? "simdgroup_barrier" : "matrix operation", first & 0xFFFFFF);
          return;
        }
        for (unsigned i = g; i < end; i++) {
          bool meet = fibres[i].state == stop::simd && fibres[i].line == first;
          if (!(flags & 16)) active[i] = meet;  // the second wait of an operation keeps them
          if (meet) fibres[i].state = stop::running;
        }
        if (flags & 2) simd_epoch[g / kLanes] = ++epochs;
        if (flags & 1) simd_device_epoch[g / kLanes] = ++epochs;
        moved = true;
      }
    if (moved) continue;
    unsigned waits = 0, other = 0;
    bool ended = false;
    for (unsigned i = 0; i < n; i++) {
      if (fibres[i].state == stop::barrier) waits = i;
      if (fibres[i].state != stop::barrier) other = i, ended = fibres[i].state == stop::done;
    }
    fault = text("%s, threadgroup (%u, %u, %u): divergent barrier: %u of %u threads wait at the "
                 "threadgroup_barrier in line %u, ",
                 kernel->name, group.at[0], group.at[1], group.at[2], barrier, n,
                 fibres[waits].line & 0xFFFFFF) +
            place(other) + (ended ? " ended without it" : " does not come");
    return;
  }
}

struct launch {
  const msl::kernel* kernel;
  msl::group group;
  unsigned long long groups;
  std::atomic<unsigned long long> next{0};
  std::atomic<bool> failed{false};
  std::mutex lock;
  unsigned long long failed_at = ~0ull;
  std::string fault;
};

std::mutex pool_lock;
std::vector<std::unique_ptr<worker>> pool;

std::unique_ptr<worker> take_worker() {
  std::lock_guard<std::mutex> hold(pool_lock);
  if (pool.empty()) return std::make_unique<worker>();
  auto w = std::move(pool.back());
  pool.pop_back();
  return w;
}

void work(launch& l, unsigned long long batch) {
  std::unique_ptr<worker> w = take_worker();
  w->kernel = l.kernel;
  w->group = l.group;
  w->fault.clear();
  w->prepare(l.group.threads);
  w->launch_epoch = ++epochs;
  w->group.current = &w->current;
  worker* outer = self;
  self = w.get();
  const unsigned* grid = l.group.grid;
  while (!l.failed) {
    unsigned long long from = l.next.fetch_add(batch);
    if (from >= l.groups) break;
    unsigned long long end = std::min(from + batch, l.groups);
    for (unsigned long long g = from; g < end && !l.failed; g++) {
      w->group.at[0] = static_cast<unsigned>(g % grid[0]);
      w->group.at[1] = static_cast<unsigned>(g / grid[0] % grid[1]);
      w->group.at[2] = static_cast<unsigned>(g / (1ull * grid[0] * grid[1]));
      w->first_thread = g * l.group.threads;
      if (settings.order == 2) w->random.seed(static_cast<unsigned>(settings.seed * 2654435761u + g));
      w->run_group();
      if (!w->fault.empty()) {
        std::lock_guard<std::mutex> hold(l.lock);
        if (g < l.failed_at) l.failed_at = g, l.fault = w->fault;
        l.failed = true;
        break;
      }
    }
  }
  self = outer;
  std::lock_guard<std::mutex> hold(pool_lock);
  pool.push_back(std::move(w));
}

// ---- races

struct conflict {
  const worker& w;
  int device;
  unsigned long long thread;
  unsigned epoch, simd, group_simd;

  // Whether `a` is another thread's access that no barrier orders before this one.
  bool with(const touch& a) const {
    if (a.epoch == 0 || a.thread == thread) return false;
    if (a.thread - w.first_thread < w.group.threads && a.thread >= w.first_thread) {
      if (a.epoch != epoch) return false;
      unsigned lane = static_cast<unsigned>(a.thread - w.first_thread);
      return lane / kLanes != group_simd || a.simd == simd;
    }
    return device && a.epoch >= w.launch_epoch;  // another group of this launch
  }

  // The same for a read and a later write: what has been read before a barrier of any kind is not
  // harmed by a write behind it.
  bool with_read(const touch& a) const {
    bool own = a.thread >= w.first_thread && a.thread - w.first_thread < w.group.threads;
    return with(a) && (!own || a.meeting == w.meetings);
  }
};

std::string describe(const worker& w, const touch& a) {
  unsigned t = static_cast<unsigned>(a.thread % w.group.threads);
  unsigned long long g = a.thread / w.group.threads;
  if (a.thread / w.group.threads == w.first_thread / w.group.threads) return w.place(t);
  const unsigned* grid = w.group.grid;
  return w.place(t) + text(" of threadgroup (%llu, %llu, %llu)", g % grid[0], g / grid[0] % grid[1],
                           g / (1ull * grid[0] * grid[1]));
}

std::string name_of(const worker& w, const void* low, const void* at) {
  const msl::kernel& k = *w.kernel;
  const char* p = static_cast<const char*>(at);
  if (low >= w.memory && low < w.memory + kGroupMemory) {
    for (unsigned i = 0; i < k.array_count; i++) {
      const msl::array& a = k.arrays[i];
      if (static_cast<const char*>(low) == w.memory + a.offset)
        return text("threadgroup array '%s' at byte %td of %u", a.name,
                    p - (w.memory + a.offset), a.bytes);
    }
    return "threadgroup memory";
  }
  std::string names;
  const msl::buffer* found = nullptr;
  for (unsigned i = 0; i < k.buffer_count; i++) {
    const msl::buffer& b = w.group.buffers[i];
    if (b.low != low) continue;
    found = &b;
    names += (names.empty() ? "" : " or ") + text("buffer(%u) '%s'", i, k.buffer_names[i]);
  }
  if (!found) return "a device buffer";
  return text("%s at byte %td of %zu", names.c_str(), p - found->data,
              static_cast<size_t>(found->bytes - (found->data - found->low)));
}

}  // namespace

std::string msl_run(const msl::kernel& kernel, const msl::group& group) {
  launch l;
  l.kernel = &kernel;
  l.group = group;
  l.groups = 1ull * group.grid[0] * group.grid[1] * group.grid[2];
  unsigned workers = kernel.mode >= 2 ? 1 : settings.workers;
  constexpr unsigned kWorth = 4096;  // threads that pay for starting an OS thread
  workers = static_cast<unsigned>(
      std::min<unsigned long long>({workers, l.groups, 1 + l.groups * group.threads / kWorth}));
  unsigned long long batch = std::max<unsigned long long>(1, l.groups / (workers * 8ull));
  std::vector<std::thread> threads;
  for (unsigned i = 1; i < workers; i++) threads.emplace_back([&] { work(l, batch); });
  work(l, batch);
  for (std::thread& t : threads) t.join();
  return l.fault;
}

unsigned msl_max_threads() { return settings.max_threads; }

extern "C" {

// order: 0 ascending, 1 descending, 2 shuffled by `seed`.
void msl_options(int order, unsigned seed, unsigned workers, unsigned max_threads) {
  settings = {order, seed, std::max(1u, workers), max_threads};
}

void msl_track(cell* cells, msl::size offset, unsigned bytes, int write, const void* value,
               const void* memory, unsigned line, int device) {
  worker& w = *self;
  unsigned granule = w.kernel->granule, thread = w.current, simd_group = thread / kLanes;
  conflict c{w, device, w.first_thread + thread, device ? w.device_epoch : w.epoch,
             (device ? w.simd_device_epoch : w.simd_epoch)[simd_group], simd_group};
  touch now{c.thread, c.epoch, c.simd, line, w.meetings};
  bool equal = write && memcmp(value, memory, bytes) == 0;
  const char* base = static_cast<const char*>(memory) - offset;
  for (msl::size i = offset / granule; i * granule < offset + bytes; i++) {
    cell& at = cells[i];
    bool written = device || at.write.epoch >= w.group_epoch;
    if (!written && !write)
      w.raise(name_of(w, base, base + i * granule) + " is read before any thread has written it" +
              at_line(line));
    // A write of the value that is there already harms nobody, whoever else reads or writes it.
    bool silent = equal && written;
    const touch* other = nullptr;
    const char* did = "writes";
    if (write && !silent) {
      if (c.with(at.write)) {
        other = &at.write;
      } else if (c.with_read(at.read)) {
        other = &at.read, did = "reads";
      } else if (c.with_read(at.reread)) {
        other = &at.reread, did = "reads";
      }
    } else if (!write && !at.silent && c.with(at.write)) {
      bool own = at.rewrite.epoch && at.rewrite.thread == c.thread;
      if (!own) other = &at.write;
    }
    if (other) {
      bool groups = other->thread / w.group.threads != c.thread / w.group.threads;
      w.raise("race on " + name_of(w, base, base + i * granule) + ": it " +
              (write ? "writes" : "reads") + at_line(line) + " what " + describe(w, *other) + " " +
              did + at_line(other->line) +
              (groups ? ", and nothing orders two threadgroups"
                      : text(", without a barrier%s in between", device ? " with mem_device" : "")));
    }
    if (!write) {
      (c.with_read(at.read) ? at.reread : at.read) = now;
    } else if (silent && c.with(at.write)) {
      at.rewrite = now;
    } else {
      at.write = now;
      at.silent = silent;
      at.rewrite = touch{};
    }
  }
}

void msl_bad_access(const void* low, const void* at, unsigned bytes, unsigned align, int write,
                    unsigned line) {
  worker& w = *self;
  std::string what = name_of(w, low, at);
  if (align)
    w.raise(text("%s of %u bytes not aligned to %u%s: ", write ? "write" : "read", bytes, align,
                 at_line(line).c_str()) + what);
  w.raise(text("%s of %u bytes out of bounds%s: ", write ? "write" : "read", bytes,
               at_line(line).c_str()) + what);
}

void msl_bad_local(const char* name, long long index, unsigned extent, unsigned line) {
  self->raise(text("element %lld of %s of %u%s", index, *name ? name : "an array of the thread",
                   extent, at_line(line).c_str()));
}

void msl_fault(const char* what, long long value, unsigned line) {
  self->raise(text("%s %lld%s", what, value, at_line(line).c_str()));
}

char* msl_group_memory() { return self->memory; }
cell* msl_group_cells() { return self->cells.data(); }

void msl_barrier(int flags, unsigned line) {
  pass_on(*self, stop::barrier, (static_cast<unsigned>(flags) << 24) | (line & 0xFFFFFF));
}

void msl_simd_wait(int flags, unsigned line) {
  pass_on(*self, stop::simd, (static_cast<unsigned>(flags) << 24) | (line & 0xFFFFFF));
}
unsigned msl_lane() { return self->current % kLanes; }
void* msl_slot(unsigned lane) { return self->slots[self->current / kLanes * kLanes + lane]; }
int msl_lane_active(unsigned lane) {
  unsigned t = self->current / kLanes * kLanes + lane;
  return t < self->group.threads && self->active[t];
}

}  // extern "C"
