// Exact counts of what the program asks of memory: bytes by buffer, distinct bytes, coalescing and
// bank conflicts.
#pragma once
#include "checker.h"

bool counters_begin(const mg_launch *launch);
void counters_end();

// Which bytes of a buffer were read and written: one bit a byte.
struct TouchMap {
  uint64_t *read, *written, words;
};
extern TouchMap touched[MG_MAX_BUFFERS];
extern mg_buffer_counters *buffer_counters;

static inline void touch(uint64_t *map, uint64_t offset, uint32_t bytes) {
  uint64_t bit = offset & 63, word = offset >> 6;
  if (MG_LIKELY(bit + bytes <= 64)) {
    uint64_t mask = (bytes == 64 ? ~0ull : (1ull << bytes) - 1) << bit;
    map[word] |= mask;
    return;
  }
  for (uint32_t i = 0; i < bytes; ++i) map[(offset + i) >> 6] |= 1ull << ((offset + i) & 63);
}

static MG_ALWAYS_INLINE void count_access(uint32_t buffer, uint32_t access, uint32_t bytes,
                                          uint64_t offset) {
  mg_buffer_counters &c = buffer_counters[buffer];
  bool reads = access == MG_READ || access == MG_ATOMIC_READ || access == MG_ATOMIC_UPDATE;
  bool writes = access == MG_WRITE || access == MG_ATOMIC_WRITE || access == MG_ATOMIC_UPDATE;
  if (access >= MG_ATOMIC_READ) c.atomics++;
  if (reads) {
    c.bytes_read += bytes;
    c.reads++;
    if (buffer != MG_THREADGROUP_MEMORY) touch(touched[buffer].read, offset, bytes);
  }
  if (writes) {
    c.bytes_written += bytes;
    c.writes++;
    if (buffer != MG_THREADGROUP_MEMORY) touch(touched[buffer].written, offset, bytes);
  }
}

// What each lane accessed since its simdgroup last met. Lanes run one after another, so what they do
// together is only known when they meet: then the k-th accesses of all lanes, at one instruction, are
// one access of the simdgroup. One LogRow holds the k-th accesses of the 32 lanes.
struct Logged {
  uint32_t code, what;  // what: bytes << 8 | buffer (MG_THREADGROUP_MEMORY, or a buffer's index)
  uint64_t address;
};
struct alignas(64) LogRow {
  Logged lanes[kLanes];
};
enum { kLogRows = 4096 };
extern LogRow *log_rows;  // kLogRows of each simdgroup, touched as far as needed
extern uint32_t log_lengths[kMaxThreads];

static MG_ALWAYS_INLINE void count_pattern(uint32_t buffer, uint32_t code, uintptr_t p, uint32_t bytes) {
  uint32_t lane = current->lane, simdgroup = current->simdgroup->index;
  uint32_t *length = &log_lengths[simdgroup * kLanes + lane];
  uint32_t n = *length;
  if (MG_UNLIKELY(n == kLogRows)) {
    report->patterns_dropped++;
    return;
  }
  log_rows[simdgroup * kLogRows + n].lanes[lane] = Logged{code, bytes << 8 | buffer, p};
  *length = n + 1;
}
