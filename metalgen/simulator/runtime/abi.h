// What crosses the border of the shared object: the launch, and the identity of one thread.
#pragma once
#include "freestanding.h"

struct mg_buffer {
  void *base;
  uint64_t bytes;
  uint32_t flags;  // MG_BUFFER_*
  uint32_t pad;
  uint64_t lead;  // bytes before base that belong to the buffer (views with negative strides)
};
enum { MG_THREADGROUP_ARGUMENTS = 31 };
enum { MG_BUFFER_WRITABLE = 1, MG_BUFFER_INITIALISED = 2, MG_BUFFER_CONSTANT = 4 };

struct mg_launch {
  uint32_t grid[3], threadgroup[3];       // in threads; the last threadgroup of a row may be partial
  uint64_t first_group, end_group, step;  // linear threadgroup ids that this process executes
  uint32_t buffer_count;
  mg_buffer *buffers;  // by Metal buffer index
  uint64_t fibre_stack_bytes;
  uint64_t seed;  // order in which threads are scheduled: 0 ascending, else pseudo-random
  void *report;   // mapped memory that survives this process; layout in report.h
  uint64_t report_bytes;
  volatile uint64_t *progress;  // incremented a finished threadgroup
  uint32_t threadgroup_bytes[MG_THREADGROUP_ARGUMENTS];  // of each threadgroup argument, by index
};

// The same layout as mg_thread in compiler/include/mg_entry.h.
struct mg_thread {
  uint32_t thread_position_in_grid[3];
  uint32_t thread_position_in_threadgroup[3];
  uint32_t threadgroup_position_in_grid[3];
  uint32_t threads_per_threadgroup[3];
  uint32_t dispatch_threads_per_threadgroup[3];
  uint32_t threads_per_grid[3];
  uint32_t threadgroups_per_grid[3];
  uint32_t grid_origin[3];
  uint32_t thread_index_in_threadgroup[3];
  uint32_t thread_index_in_simdgroup[3];
  uint32_t simdgroup_index_in_threadgroup[3];
  uint32_t simdgroups_per_threadgroup[3];
  uint32_t dispatch_simdgroups_per_threadgroup[3];
  uint32_t threads_per_simdgroup[3];
  uint32_t thread_execution_width[3];
  uint32_t quadgroup_index_in_threadgroup[3];
  uint32_t thread_index_in_quadgroup[3];
  uint32_t quadgroups_per_threadgroup[3];
  uint32_t grid_size[3];
};

extern "C" {
__attribute__((visibility("default"))) int mg_run(const mg_launch *launch);
// Generated with the kernel: calls it for one thread.
void mg_kernel(const mg_thread *thread);
}
