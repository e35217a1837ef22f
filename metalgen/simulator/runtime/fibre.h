// Fibres: one stack a GPU thread, and the switch between two of them.
//
// The switch saves a resume address and the frame pointer on the old stack, and declares every other
// register lost, so that the compiler saves only what it needs. It leaves by an indirect jump, which
// the processor predicts; a return would be predicted from the wrong stack's calls.
#pragma once
#include "freestanding.h"

struct Fibre {
  void *stack_pointer;
};

#if defined(__x86_64__)
static MG_ALWAYS_INLINE void fibre_switch(Fibre *from, Fibre *to) {
  register Fibre *source __asm__("rdi") = from;
  register Fibre *target __asm__("rsi") = to;
  __asm__ volatile(
      "pushq %%rbp\n\t"
      "pushq %%rbx\n\t"
      "leaq 1f(%%rip), %%rax\n\t"
      "pushq %%rax\n\t"
      "movq %%rsp, (%%rdi)\n\t"
      "movq (%%rsi), %%rsp\n\t"
      "popq %%rax\n\t"
      "jmpq *%%rax\n\t"
      "1:\n\t"
      "popq %%rbx\n\t"
      "popq %%rbp\n\t"
      : "+r"(source), "+r"(target)
      :
      : "rax", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "xmm0", "xmm1",
        "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12",
        "xmm13", "xmm14", "xmm15", "memory", "cc");
}
// A fresh fibre starts at entry, with the stack as after a call.
static inline void fibre_prepare(Fibre *fibre, char *stack_top, void (*entry)()) {
  uintptr_t *sp = (uintptr_t *)((uintptr_t)stack_top & ~(uintptr_t)15);
  *--sp = 0;  // the return address of a function that never returns; keeps sp = 8 mod 16 at entry
  *--sp = (uintptr_t)entry;
  fibre->stack_pointer = sp;
}
#elif defined(__aarch64__)
static MG_ALWAYS_INLINE void fibre_switch(Fibre *from, Fibre *to) {
  register Fibre *source __asm__("x0") = from;
  register Fibre *target __asm__("x1") = to;
  __asm__ volatile(
      "stp x29, x19, [sp, #-32]!\n\t"
      "adr x9, 1f\n\t"
      "str x9, [sp, #16]\n\t"
      "mov x9, sp\n\t"
      "str x9, [x0]\n\t"
      "ldr x9, [x1]\n\t"
      "mov sp, x9\n\t"
      "ldr x9, [sp, #16]\n\t"
      "br x9\n\t"
      "1:\n\t"
      "ldp x29, x19, [sp], #32\n\t"
      : "+r"(source), "+r"(target)
      :
      : "x2", "x3", "x4", "x5", "x6", "x7", "x8", "x9", "x10", "x11", "x12", "x13", "x14", "x15",
        "x16", "x17", "x20", "x21", "x22", "x23", "x24", "x25", "x26", "x27", "x28", "x30", "v0",
        "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v8", "v9", "v10", "v11", "v12", "v13", "v14",
        "v15", "v16", "v17", "v18", "v19", "v20", "v21", "v22", "v23", "v24", "v25", "v26", "v27",
        "v28", "v29", "v30", "v31", "memory", "cc");
}
// Where a fresh fibre lands: drop the frame that the switch left and go to the entry in x19's place.
__asm__(
    ".text\n.p2align 2\n"
    "mg_fibre_start:\n\t"
    "ldp x29, x19, [sp], #32\n\t"
    "mov x30, xzr\n\t"
    "br x19\n");
extern "C" void mg_fibre_start() __attribute__((visibility("hidden")));
static inline void fibre_prepare(Fibre *fibre, char *stack_top, void (*entry)()) {
  uintptr_t *sp = (uintptr_t *)((uintptr_t)stack_top & ~(uintptr_t)15) - 4;
  sp[0] = 0;                           // x29
  sp[1] = (uintptr_t)entry;            // x19
  sp[2] = (uintptr_t)&mg_fibre_start;  // the resume address
  sp[3] = 0;
  fibre->stack_pointer = sp;
}
#else
#error "the simulator's fibres know x86-64 and aarch64"
#endif
