// Memory of a launch: fibre stacks with guard pages, buffers, the threadgroup's arena, and the
// handler that says what a fatal signal was.
#pragma once
#include "scheduler.h"

bool memory_begin(uint32_t threads);
void memory_end();
char *stack_top(uint32_t thread);
char *array_stack_top(uint32_t thread);

enum { kArenaBytes = 1 << 20, kMaxVariables = 1024, kRedZone = 2048 };

// A threadgroup variable of the kernel, placed when the first thread reaches its declaration.
struct Variable {
  uint64_t offset, bytes;
};
extern Variable variables[kMaxVariables];
extern uint32_t variable_count;
extern uint64_t arena_used;   // bytes of the arena that hold variables and their red zones
extern char *arena;
extern char *stacks_begin, *stacks_end;
extern "C" char mg_dummy_buffer[4096];

void report_begin();
void *map_memory(uint64_t bytes);  // zeros, not yet in use; null when there is no room
