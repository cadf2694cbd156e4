// Switching between fibres: what a thread of an emulated device runs on. To be included once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#endif

namespace emu {

#if defined(__x86_64__) || defined(__aarch64__)

#if defined(__APPLE__)
#define EMU_SYMBOL "_emu_switch"
#else
#define EMU_SYMBOL "emu_switch"
#endif

extern "C" void emu_switch(void** save, void* load);
#if defined(__x86_64__)
asm(".text\n.globl " EMU_SYMBOL "\n" EMU_SYMBOL
    ":\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp, (%rdi)\nmovq %rsi, %rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");
#else
asm(".text\n.globl " EMU_SYMBOL "\n.p2align 2\n" EMU_SYMBOL
    ":\n"
    "sub sp, sp, #160\n"
    "stp x19, x20, [sp]\nstp x21, x22, [sp, #16]\nstp x23, x24, [sp, #32]\n"
    "stp x25, x26, [sp, #48]\nstp x27, x28, [sp, #64]\nstp x29, x30, [sp, #80]\n"
    "stp d8, d9, [sp, #96]\nstp d10, d11, [sp, #112]\nstp d12, d13, [sp, #128]\n"
    "stp d14, d15, [sp, #144]\n"
    "mov x9, sp\nstr x9, [x0]\nmov sp, x1\n"
    "ldp x19, x20, [sp]\nldp x21, x22, [sp, #16]\nldp x23, x24, [sp, #32]\n"
    "ldp x25, x26, [sp, #48]\nldp x27, x28, [sp, #64]\nldp x29, x30, [sp, #80]\n"
    "ldp d8, d9, [sp, #96]\nldp d10, d11, [sp, #112]\nldp d12, d13, [sp, #128]\n"
    "ldp d14, d15, [sp, #144]\n"
    "add sp, sp, #160\nret\n");
#endif

using context = void*;

inline void start_context(context& c, char* stack, size_t bytes, void (*entry)()) {
  auto top = reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15};
#if defined(__x86_64__)
  auto* sp = reinterpret_cast<void**>(top);
  *--sp = nullptr;  // where a call would have left its return address
  *--sp = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; i++) *--sp = nullptr;
  c = sp;
#else
  auto* frame = reinterpret_cast<void**>(top - 160);
  memset(frame, 0, 160);
  frame[11] = reinterpret_cast<void*>(entry);  // x30
  c = frame;
#endif
}
inline void switch_context(context& from, context& to) { emu_switch(&from, to); }

#else

using context = ucontext_t;
inline void start_context(context& c, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&c);
  c.uc_stack.ss_sp = stack;
  c.uc_stack.ss_size = bytes;
  c.uc_link = nullptr;
  makecontext(&c, entry, 0);
}
inline void switch_context(context& from, context& to) { swapcontext(&from, &to); }

#endif

}  // namespace emu
