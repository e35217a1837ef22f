// Shadow memory: who last wrote and read each two bytes of memory that may be written.
//
// A record says which thread accessed, from where, and in which epoch of that memory space. The
// epoch of a threadgroup grows at a threadgroup_barrier with the space's flag; that of a simdgroup
// also at a simdgroup_barrier with it. Two accesses of one location by different threads, one of
// them a write, are ordered only by an epoch between them: the simdgroup's when both threads belong
// to one, else the threadgroup's. Threadgroups are never ordered. Which thread ran first does not
// matter, so a missing barrier is found on any schedule.
#pragma once
#include "checker.h"

struct Record {
  uint64_t what;   // fields below
  uint32_t group;  // linear threadgroup id + 1; 0: no access yet
  uint32_t code;   // the instruction, as an offset into the shared object
};

// thread 12 bits, atomic 1, mask 2 (which of the two bytes), written 2 (in writer records: bytes
// ever written; in reader records: an atomic update), threadgroup epoch 24, simdgroup epoch 23
enum : uint64_t {
  kThread = 0xfff,
  kThreadSimdgroup = 0xfe0,
  kAtomic = 1 << 12,
  kMask = 3 << 13,
  kWritten = 3 << 15,
  kEpoch = 0xffffffull << 17,
};
enum { kMaskShift = 13, kWrittenShift = 15, kEpochShift = 17, kSimdgroupEpochShift = 41 };

// The reader before `reader` is kept too, in `same` when it was of the same simdgroup, else in
// `other`: whichever thread writes next, one of the three differs from it.
struct alignas(64) Cell {
  Record writer, reader, same, other;
};

static inline bool unordered(const Record &r, const Record &mine, bool device) {
  if (r.group != mine.group) return device && r.group != 0;
  uint64_t x = r.what ^ mine.what;
  if ((x & kThread) == 0) return false;
  if ((x & kThreadSimdgroup) == 0) return (x >> kSimdgroupEpochShift) == 0;
  return (x & kEpoch) == 0;
}
