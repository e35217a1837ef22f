// Fibres: one stack a GPU thread, and the switch between two of them.
//
// A kernel waits by calling a stub (MG_STUB below). The stub saves the frame pointer and its own
// return address, which lie on the stack then, calls the C++ function that decides who runs next,
// and leaves on that fibre's stack by an indirect jump. Nothing else is saved: the stubs have clang's
// calling convention preserve_none, under which the caller keeps what it needs on its own stack.
// The jump is predicted from where it went before; a return would be predicted from the calls of the
// fibre that just left.
#pragma once
#include "freestanding.h"

struct Fibre {
  void *stack_pointer;
};

#define MG_WAITS __attribute__((preserve_none))

extern "C" {
// Where a stub was called from, whom it leaves, and whom it goes to. Set and read around each wait.
extern uintptr_t mg_site __attribute__((visibility("hidden")));
extern Fibre *mg_from __attribute__((visibility("hidden")));
extern Fibre *mg_to __attribute__((visibility("hidden")));
// Leaves the caller, a plain function, for mg_to; returns when its own fibre, mg_from, is run again.
void mg_enter() __attribute__((visibility("hidden")));
}

#if defined(__APPLE__)
#define MG_SYMBOL(name) "_" #name
#define MG_HIDDEN(name) ".private_extern _" #name "\n"
#else
#define MG_SYMBOL(name) #name
#define MG_HIDDEN(name) ".hidden " #name "\n"
#endif

#if defined(__x86_64__)
#define MG_SWITCH                          \
  "movq " MG_SYMBOL(mg_from) "(%rip), %r10\n\t" \
  "movq " MG_SYMBOL(mg_to) "(%rip), %r11\n\t"   \
  "movq %rsp, (%r10)\n\t"                  \
  "movq (%r11), %rsp\n\t"                  \
  "popq %rbp\n\t"                          \
  "popq %rcx\n\t"                          \
  "jmpq *%rcx\n"
#define MG_STUB(name)                                                  \
  __asm__(".text\n.p2align 4\n.globl " MG_SYMBOL(mg_##name) "\n"       \
          MG_HIDDEN(mg_##name) MG_SYMBOL(mg_##name) ":\n\t"            \
          "pushq %rbp\n\t"                                             \
          "movq 8(%rsp), %r10\n\t"                                     \
          "movq %r10, " MG_SYMBOL(mg_site) "(%rip)\n\t"                \
          "callq " MG_SYMBOL(mg_arrive_##name) "\n\t" MG_SWITCH)
#define MG_ENTER_STUB                                                  \
  __asm__(".text\n.p2align 4\n.globl " MG_SYMBOL(mg_enter) "\n"        \
          MG_HIDDEN(mg_enter) MG_SYMBOL(mg_enter) ":\n\t"              \
          "pushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t" \
          "leaq 1f(%rip), %r10\n\tpushq %r10\n\tpushq %rbp\n\t" MG_SWITCH          \
          "1:\n\tpopq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tretq\n")
// A fresh fibre starts at entry, with the stack as after a call.
static inline void fibre_prepare(Fibre *fibre, char *stack_top, void (*entry)()) {
  uintptr_t *sp = (uintptr_t *)((uintptr_t)stack_top & ~(uintptr_t)15) - 3;
  sp[0] = 0;  // the frame pointer
  sp[1] = (uintptr_t)entry;
  sp[2] = 0;  // the return address of a function that never returns
  fibre->stack_pointer = sp;
}
#elif defined(__aarch64__)
#if defined(__APPLE__)
#define MG_ADDRESS(reg, name) "adrp " reg ", _" #name "@PAGE\n\tadd " reg ", " reg ", _" #name "@PAGEOFF\n\t"
#else
#define MG_ADDRESS(reg, name) "adrp " reg ", " #name "\n\tadd " reg ", " reg ", :lo12:" #name "\n\t"
#endif
#define MG_SWITCH                                    \
  MG_ADDRESS("x16", mg_from) "ldr x16, [x16]\n\t"    \
  MG_ADDRESS("x17", mg_to) "ldr x17, [x17]\n\t"      \
  "mov x9, sp\n\tstr x9, [x16]\n\t"                  \
  "ldr x9, [x17]\n\tmov sp, x9\n\t"                  \
  "ldp x29, x30, [sp], #16\n\t"                      \
  "br x30\n"
#define MG_STUB(name)                                                  \
  __asm__(".text\n.p2align 4\n.globl " MG_SYMBOL(mg_##name) "\n"       \
          MG_HIDDEN(mg_##name) MG_SYMBOL(mg_##name) ":\n\t"            \
          "stp x29, x30, [sp, #-16]!\n\t"                              \
          MG_ADDRESS("x16", mg_site) "str x30, [x16]\n\t"              \
          "bl " MG_SYMBOL(mg_arrive_##name) "\n\t" MG_SWITCH)
#define MG_ENTER_STUB                                                  \
  __asm__(".text\n.p2align 4\n.globl " MG_SYMBOL(mg_enter) "\n"        \
          MG_HIDDEN(mg_enter) MG_SYMBOL(mg_enter) ":\n\t"              \
          "stp d8, d9, [sp, #-160]!\n\tstp d10, d11, [sp, #16]\n\t"    \
          "stp d12, d13, [sp, #32]\n\tstp d14, d15, [sp, #48]\n\t"     \
          "stp x19, x20, [sp, #64]\n\tstp x21, x22, [sp, #80]\n\t"     \
          "stp x23, x24, [sp, #96]\n\tstp x25, x26, [sp, #112]\n\t"    \
          "stp x27, x28, [sp, #128]\n\tstp x29, x30, [sp, #144]\n\t"   \
          "adr x30, 1f\n\tstp x29, x30, [sp, #-16]!\n\t" MG_SWITCH     \
          "1:\n\tldp d10, d11, [sp, #16]\n\t"                          \
          "ldp d12, d13, [sp, #32]\n\tldp d14, d15, [sp, #48]\n\t"     \
          "ldp x19, x20, [sp, #64]\n\tldp x21, x22, [sp, #80]\n\t"     \
          "ldp x23, x24, [sp, #96]\n\tldp x25, x26, [sp, #112]\n\t"    \
          "ldp x27, x28, [sp, #128]\n\tldp x29, x30, [sp, #144]\n\t"   \
          "ldp d8, d9, [sp], #160\n\tret\n")
static inline void fibre_prepare(Fibre *fibre, char *stack_top, void (*entry)()) {
  uintptr_t *sp = (uintptr_t *)((uintptr_t)stack_top & ~(uintptr_t)15) - 2;
  sp[0] = 0;  // x29
  sp[1] = (uintptr_t)entry;
  fibre->stack_pointer = sp;
}
#else
#error "the simulator's fibres know x86-64 and aarch64"
#endif
