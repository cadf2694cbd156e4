/*
 * The calls between wasi-libc and the JavaScript side.
 *
 * wasi-libc reaches its host through functions named __imported_wasi_snapshot_preview1_*; defining
 * one here replaces the import of that name. @mlc-ai/web-runtime provides few of them, and those
 * it provides read memory through typed arrays that are stale after the memory has grown: text
 * written then is garbage. `emscripten_notify_memory_growth` renews the arrays, so it is called
 * before every call that passes a pointer.
 */
#include <stdint.h>

#define IMPORT(module, name) __attribute__((import_module(module), import_name(name)))
#define HOST(name) __imported_wasi_snapshot_preview1_##name

/* Error numbers of WASI preview 1. */
enum { kBadFile = 8, kNoSystem = 52, kIsPipe = 70 };

IMPORT("env", "emscripten_notify_memory_growth")
void js_renew_views(int32_t memory);
IMPORT("wasi_snapshot_preview1", "fd_write")
int32_t js_fd_write(int32_t fd, int32_t vectors, int32_t count, int32_t written);
IMPORT("wasi_snapshot_preview1", "clock_time_get")
int32_t js_clock_time_get(int32_t clock, int64_t precision, int32_t time);
IMPORT("wasi_snapshot_preview1", "proc_exit")
_Noreturn void js_proc_exit(int32_t code);

int32_t HOST(fd_write)(int32_t fd, int32_t vectors, int32_t count, int32_t written) {
  js_renew_views(0);
  return js_fd_write(fd, vectors, count, written);
}

int32_t HOST(clock_time_get)(int32_t clock, int64_t precision, int32_t time) {
  js_renew_views(0);
  return js_clock_time_get(clock, precision, time);
}

_Noreturn void HOST(proc_exit)(int32_t code) { js_proc_exit(code); }

/* No environment variables. */
int32_t HOST(environ_sizes_get)(int32_t count, int32_t size) {
  *(int32_t*)(uintptr_t)count = 0;
  *(int32_t*)(uintptr_t)size = 0;
  return 0;
}
int32_t HOST(environ_get)(int32_t pointers, int32_t text) { return 0; }

/* No files: only the standard streams are open, and they can't seek or be read. */
int32_t HOST(fd_close)(int32_t fd) { return 0; }
int32_t HOST(fd_read)(int32_t fd, int32_t vectors, int32_t count, int32_t read) { return kBadFile; }
int32_t HOST(fd_seek)(int32_t fd, int64_t offset, int32_t whence, int32_t position) { return kIsPipe; }
int32_t HOST(fd_fdstat_get)(int32_t fd, int32_t stat) { return kNoSystem; }
int32_t HOST(fd_fdstat_set_flags)(int32_t fd, int32_t flags) { return kNoSystem; }
int32_t HOST(fd_prestat_get)(int32_t fd, int32_t prestat) { return kBadFile; }
int32_t HOST(fd_prestat_dir_name)(int32_t fd, int32_t path, int32_t size) { return kBadFile; }
int32_t HOST(path_open)(int32_t fd, int32_t lookup, int32_t path, int32_t size, int32_t open_flags,
                        int64_t rights, int64_t inherited, int32_t flags, int32_t opened) {
  return kNoSystem;
}
int32_t HOST(path_unlink_file)(int32_t fd, int32_t path, int32_t size) { return kNoSystem; }

/* Randomness comes from the caller (the samplers take uniform numbers as input). */
int32_t HOST(random_get)(int32_t buffer, int32_t size) { return kNoSystem; }
