// The report: what a run leaves in the memory that launch->report points to, which outlives the
// process. Little-endian, naturally aligned, no pointers. Python reads it (compiler/report.py).
//
//   mg_report header
//   mg_buffer_counters x MG_MAX_BUFFERS   at buffer_counters
//   mg_finding x finding_count            at findings (finding_capacity fit)
#pragma once
#include "freestanding.h"

enum { MG_REPORT_VERSION = 1, MG_MAX_BUFFERS = 32, MG_THREADGROUP_MEMORY = 32 };

enum mg_status : uint32_t {
  MG_STATUS_NOT_STARTED = 0,
  MG_STATUS_RUNNING = 1,
  MG_STATUS_DONE = 2,
  MG_STATUS_STACK_OVERFLOW = 3,  // fatal_address: the instruction; the process dies of SIGSEGV
  MG_STATUS_CRASH = 4,           // fatal_signal, fatal_address, fatal_memory
  MG_STATUS_OUT_OF_MEMORY = 5,   // stacks or shadow memory could not be mapped; mg_run returns 5
  MG_STATUS_BAD_LAUNCH = 6,      // mg_run returns 6
};

// A finding's kind. Accesses are of buffers (by index) or of threadgroup memory.
enum mg_kind : uint32_t {
  MG_RACE = 1,               // other_*: the earlier access
  MG_RACE_THREADGROUPS = 2,  // between two threadgroups; no barrier orders those
  MG_RACE_ATOMIC = 3,        // an atomic against a plain access
  MG_OUT_OF_BOUNDS = 4,      // buffer, offset (negative, or past the end)
  MG_WILD_ACCESS = 5,        // an address near no buffer; memory
  MG_UNINITIALISED = 6,      // a read of memory that nothing wrote
  MG_READ_ONLY = 7,          // a write to a buffer that may not be written
  MG_MISALIGNED = 8,         // value: the alignment that the access needs
  MG_DIVERGENT_BARRIER = 9,  // value: lanes or threads that came; other_address: where others wait
  MG_DIVERGENT_COLLECTIVE = 10,
  MG_INACTIVE_LANE = 11,   // value: the lane that was read
  MG_UNDEFINED = 12,       // value: mg_undefined
  MG_THREADGROUP_TOO_LARGE = 13,  // value: bytes of threadgroup memory, over 32768
  MG_TOO_MANY_BUFFERS = 14,       // value: buffers, over 31
  MG_TOO_MANY_THREADS = 15,       // value: threads of a threadgroup, over 1024
};
enum mg_undefined : uint32_t {
  MG_SIGNED_OVERFLOW = 1,
  MG_SHIFT = 2,
  MG_DIVISION = 3,
  MG_ARRAY_INDEX = 4,  // an index outside of an array in any memory
};
enum mg_space : uint32_t { MG_SPACE_NONE, MG_SPACE_DEVICE, MG_SPACE_THREADGROUP, MG_SPACE_CONSTANT };
enum mg_access : uint32_t { MG_ACCESS_NONE, MG_READ, MG_WRITE, MG_ATOMIC_READ, MG_ATOMIC_WRITE, MG_ATOMIC_UPDATE };

struct mg_finding {
  uint32_t kind, access;   // mg_kind, mg_access
  uint32_t space, buffer;  // mg_space; Metal buffer index, or threadgroup variable, or ~0
  int64_t offset;          // bytes from the start of that buffer or variable
  uint64_t bytes;          // size of the access
  uint64_t limit;          // size of that buffer or variable
  uint64_t memory;         // the address of the memory, in the process
  uint64_t address;        // the instruction, as an offset into the shared object
  uint32_t thread[3];      // thread_position_in_threadgroup
  uint32_t threadgroup[3];
  uint64_t other_address;  // 0: none
  uint32_t other_thread[3];
  uint32_t other_threadgroup[3];
  uint32_t other_access, pad;
  int64_t value;
  uint64_t count;
};

struct mg_buffer_counters {
  uint64_t bytes_read, bytes_written, distinct_read, distinct_written;
  uint64_t reads, writes, atomics;   // accesses of one lane
  uint64_t simdgroup_accesses, lines;  // simdgroup-wide accesses, and the 128-byte lines they touch
};

struct mg_report {
  char magic[8];  // "MGREPORT"
  uint32_t version, status;
  uint64_t buffer_counters, findings;  // offsets from the start of the report
  uint32_t finding_count, finding_capacity;
  uint64_t findings_dropped;  // places that no longer fitted
  uint64_t fatal_address, fatal_memory;
  uint32_t fatal_signal, fatal_thread[3], fatal_threadgroup[3], checked;
  uint64_t threadgroups, threads, threadgroup_bytes;
  uint64_t multiply_accumulates;     // 8x8x8 matrix products, one a simdgroup
  uint64_t exponentials;             // exp, exp2, exp10, one a thread
  uint64_t threadgroup_barriers;     // one a threadgroup
  uint64_t simdgroup_barriers;       // one a simdgroup
  uint64_t shuffles, reductions, ballots;  // one a simdgroup
  uint64_t thread_barriers;          // threadgroup barriers, one a simdgroup
  // Simdgroup-wide threadgroup accesses, and the passes that 32 banks of 4 bytes need beyond the
  // fewest: most distinct words in one bank, less the distinct words / 32 (rounded up).
  uint64_t bank_accesses, bank_conflicts;
  uint64_t patterns_dropped;  // accesses too far from the next meeting of the lanes to be matched
};
