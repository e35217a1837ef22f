// The checked build: what every access, barrier and collective is checked for. The instrumented
// kernel calls mg_read_*, mg_write_*; see compiler/instrument.py.
#include "checker.h"
#include "counters.h"
#include "shadow.h"

// --- findings -----------------------------------------------------------------------------------

static const uint32_t kPlaces = 4096;
static uint64_t places[kPlaces];          // kind, code and other code of a finding: its identity
static uint32_t place_finding[kPlaces];
static uint64_t place_access[kPlaces];    // the access that met it last
static uint32_t place_count;
static uint64_t access_number;            // of the access, or other event, now checked

static mg_finding *findings() { return (mg_finding *)((char *)report + report->findings); }

// The finding of this kind at this place, new or met again; null when there is no room for it.
static mg_finding *find(uint32_t kind, uintptr_t code, uint64_t other_code, Lane *lane) {
  uint64_t identity = (uint64_t)kind << 58 ^ (uint64_t)(uint32_t)code << 28 ^ other_code;
  uint32_t slot = (uint32_t)((identity * 0x9e3779b97f4a7c15ull) >> 52);
  for (; places[slot]; slot = (slot + 1) % kPlaces) {
    if (places[slot] == identity) {
      if (place_access[slot] != access_number) findings()[place_finding[slot]].count++;
      place_access[slot] = access_number;
      return nullptr;
    }
  }
  if (report->finding_count >= report->finding_capacity || place_count >= kPlaces / 2) {
    report->findings_dropped++;
    return nullptr;
  }
  place_count++;
  places[slot] = identity;
  place_finding[slot] = report->finding_count;
  place_access[slot] = access_number;
  mg_finding *f = &findings()[report->finding_count++];
  memset(f, 0, sizeof *f);
  f->kind = kind;
  f->address = code;
  f->buffer = ~0u;
  f->count = 1;
  if (lane) memcpy(f->thread, lane->identity.thread_position_in_threadgroup, 12);
  memcpy(f->threadgroup, group.position, 12);
  f->other_address = other_code;
  return f;
}

static uint32_t code_of(uintptr_t site) { return (uint32_t)(site - image_base()); }

static void thread_position(uint32_t index, uint32_t out[3]) {
  const uint32_t *size = current->identity.threads_per_threadgroup;
  out[0] = index % size[0];
  out[1] = index / size[0] % size[1];
  out[2] = index / size[0] / size[1];
}
static void group_position(uint32_t linear, uint32_t out[3]) {
  const uint32_t *n = current->identity.threadgroups_per_grid;
  out[0] = (uint32_t)(linear % n[0]);
  out[1] = (uint32_t)(linear / n[0] % n[1]);
  out[2] = (uint32_t)(linear / n[0] / n[1]);
}

// What is reported takes its arguments by value, so that the usual way, on which nothing is, keeps
// them in registers.

// What an access is, and where it belongs: one device buffer, or one threadgroup variable.
struct Access {
  uintptr_t address;
  uint32_t bytes, access, space, buffer;
  int64_t offset;
  uint64_t limit;  // 0 with a buffer's number: in threadgroup memory, and found when it is reported
};

__attribute__((noinline, cold)) static mg_finding *report_access(uint32_t kind, Access a,
                                                                 uint32_t code, uint64_t other) {
  mg_finding *f = find(kind, code, other, current);
  if (!f) return nullptr;
  if (a.space == MG_SPACE_THREADGROUP && !a.limit && a.buffer != ~0u) {
    a.offset = (int64_t)(a.address - (uintptr_t)arena - variables[a.buffer].offset);
    a.limit = variables[a.buffer].bytes;
  }
  f->access = a.access;
  f->space = a.space;
  f->buffer = a.buffer;
  f->offset = a.offset;
  f->bytes = a.bytes;
  f->limit = a.limit;
  f->memory = a.address;
  return f;
}

__attribute__((noinline, cold)) static void report_race(Access a, Record mine, Record other,
                                                        bool other_writes) {
  bool atomic = ((mine.what ^ other.what) & kAtomic) != 0;
  uint32_t kind = atomic ? MG_RACE_ATOMIC
                         : mine.group != other.group ? MG_RACE_THREADGROUPS : MG_RACE;
  mg_finding *f = report_access(kind, a, mine.code, other.code);
  if (!f) return;
  thread_position(other.what & kThread, f->other_thread);
  group_position(other.group - 1, f->other_threadgroup);
  bool other_atomic = (other.what & kAtomic) != 0;
  bool update = other_atomic && (other_writes || (other.what & kWritten));
  f->other_access = update          ? MG_ATOMIC_UPDATE
                    : other_writes  ? MG_WRITE
                    : other_atomic  ? MG_ATOMIC_READ
                                    : MG_READ;
}

// --- the memory of a launch ---------------------------------------------------------------------

struct Buffer {
  uintptr_t begin, end;  // valid bytes
  uintptr_t base;        // offset 0
  uint32_t index, flags;
  Cell *cells;           // of the bytes from begin; null when nothing may write it
};
static Buffer buffers[MG_MAX_BUFFERS];
static uint32_t buffer_total, last_buffer;
static Cell *arena_cells;  // of the arena
static const uint64_t kArenaCellBytes = kArenaBytes / 2 * sizeof(Cell);
// Of each 16 bytes: 0, or variable index + 1, and kPartly where the variable ends within.
static uint16_t arena_owner[kArenaBytes / 16];
enum { kPartly = 0x8000 };
alignas(64) static char scratch[4096];         // what an access out of bounds gets
alignas(64) static char scratch_zero[4096];

static uint32_t epoch[2];                               // of the threadgroup, by space
static uint32_t simdgroup_epoch[2][kMaxThreads / kLanes];
static uint64_t now[2][kMaxThreads / kLanes];  // a record's `what` but for lane, mask and atomic
enum { kDevice = 0, kThreadgroup = 1 };

bool check_begin() {
  memset(places, 0, sizeof places);
  memset(place_access, 0, sizeof place_access);
  place_count = 0;
  buffer_total = 0;
  last_buffer = 0;
  memset(arena_owner, 0, sizeof arena_owner);
  arena_cells = (Cell *)map_memory(kArenaCellBytes);
  if (!arena_cells) return false;
  uint32_t bound = 0;
  for (uint32_t i = 0; i < launch->buffer_count && i < MG_MAX_BUFFERS; ++i) {
    const mg_buffer &b = launch->buffers[i];
    if (!b.base) continue;
    bound++;
    Buffer &o = buffers[buffer_total++];
    o.base = (uintptr_t)b.base;
    o.begin = o.base - b.lead;
    o.end = o.base + b.bytes;
    o.index = i;
    o.flags = b.flags;
    o.cells = nullptr;
    if ((b.flags & MG_BUFFER_WRITABLE) && o.end > o.begin) {
      o.cells = (Cell *)map_memory(((o.end - o.begin) / 2 + 1) * sizeof(Cell));
      if (!o.cells) return false;
    }
  }
  if (!counters_begin(launch)) return false;
  uint64_t threads =
      (uint64_t)launch->threadgroup[0] * launch->threadgroup[1] * launch->threadgroup[2];
  if (threads > 1024) {
    mg_finding *f = find(MG_TOO_MANY_THREADS, 0, 0, nullptr);
    if (f) f->value = (int64_t)threads;
  }
  if (bound > 31 || launch->buffer_count > 31) {
    mg_finding *f = find(MG_TOO_MANY_BUFFERS, 0, 0, nullptr);
    if (f) f->value = launch->buffer_count;
  }
  return true;
}

void check_end() {
  for (uint32_t i = 0; i < buffer_total; ++i) {
    Buffer &b = buffers[i];
    if (b.cells) munmap(b.cells, ((b.end - b.begin) / 2 + 1) * sizeof(Cell));
    b.cells = nullptr;
  }
  if (arena_cells) munmap(arena_cells, kArenaCellBytes);
  arena_cells = nullptr;
  counters_end();
}

static void set_now(uint32_t space, uint32_t simdgroup) {
  now[space][simdgroup] = (uint64_t)simdgroup * kLanes |
                          (uint64_t)(epoch[space] & 0xffffff) << kEpochShift |
                          (uint64_t)simdgroup_epoch[space][simdgroup] << kSimdgroupEpochShift;
}

void check_threadgroup_begin() {
  epoch[0] = epoch[1] = 0;
  memset(simdgroup_epoch, 0, sizeof simdgroup_epoch);
  for (uint32_t s = 0; s < kMaxThreads / kLanes; ++s) {
    set_now(0, s);
    set_now(1, s);
  }
}
void check_threadgroup_end() {
  for (uint32_t s = 0; s < group.simdgroup_count; ++s) count_lanes(simdgroup_at(s), ~0u);
}

void check_variable(const Variable *v) {
  uint64_t first = v->offset / 16, last = (v->offset + v->bytes - 1) / 16;
  for (uint64_t i = first; i <= last; ++i) arena_owner[i] = (uint16_t)(v - variables + 1);
  if ((v->offset + v->bytes) % 16) arena_owner[last] |= kPartly;
  if (report->threadgroup_bytes > 32768) {
    mg_finding *f = find(MG_THREADGROUP_TOO_LARGE, 0, 0, nullptr);
    if (f) f->value = (int64_t)report->threadgroup_bytes;
  }
}

void check_barrier(uint32_t flags, bool, uint32_t) {
  for (uint32_t space = 0; space < 2; ++space) {
    if (!(flags & (1u << space))) continue;
    epoch[space]++;
    for (uint32_t s = 0; s < group.simdgroup_count; ++s) {
      simdgroup_epoch[space][s]++;
      set_now(space, s);
    }
  }
}
void check_simdgroup_barrier(Simdgroup *s, uint32_t flags) {
  for (uint32_t space = 0; space < 2; ++space)
    if (flags & (1u << space)) {
      simdgroup_epoch[space][s->index]++;
      set_now(space, s->index);
    }
}

// --- barriers and collectives -------------------------------------------------------------------

void finding_divergent_barrier(Lane *lane, uintptr_t other_site, uint32_t came) {
  access_number++;
  mg_finding *f = find(MG_DIVERGENT_BARRIER, code_of(lane->site),
                       other_site ? code_of(other_site) : 0, lane);
  if (f) f->value = came;
}
void finding_divergent_collective(Simdgroup *s, uint32_t active) {
  Lane *lane = &s->lanes[__builtin_ctz(active)];
  uint32_t waiting = s->at_collective | s->at_barrier;
  access_number++;
  uintptr_t other = waiting ? s->lanes[__builtin_ctz(waiting)].site : 0;
  if (other >= kMeetingPoint) other = 0;
  mg_finding *f = find(MG_DIVERGENT_COLLECTIVE, code_of(lane->site), other ? code_of(other) : 0, lane);
  if (f) f->value = __builtin_popcount(active);
}
void finding_inactive_lane(Lane *lane, int source) {
  access_number++;
  mg_finding *f = find(MG_INACTIVE_LANE, code_of(lane->site), 0, lane);
  if (f) f->value = source;
}

// --- accesses -----------------------------------------------------------------------------------

static MG_ALWAYS_INLINE Record record(uint32_t space, uint32_t code, bool atomic) {
  Lane *me = current;
  Simdgroup *s = me->simdgroup;
  uint64_t what = now[space][s->index] | me->lane;
  if (atomic) what |= kAtomic;
  return Record{what, (uint32_t)group.linear + 1, code};
}

static MG_ALWAYS_INLINE bool conflicts(const Record &r, const Record &mine, uint64_t mask, bool device) {
  if (MG_LIKELY(!unordered(r, mine, device))) return false;
  if (!(r.what & mask)) return false;
  return !(r.what & mine.what & kAtomic);
}

static MG_ALWAYS_INLINE void check_read(Cell *c, const Access &a, const Record &mine, uint64_t mask,
                                        bool device, bool initialised) {
  bool update = a.access == MG_ATOMIC_UPDATE;
  if (MG_UNLIKELY(conflicts(c->writer, mine, mask, device))) report_race(a, mine, c->writer, true);
  if (!initialised) {
    uint64_t need = mask << (kWrittenShift - kMaskShift);
    bool written = (c->writer.what & need) == need && (device || c->writer.group == mine.group);
    if (MG_UNLIKELY(!written)) report_access(MG_UNINITIALISED, a, mine.code, 0);
  }
  Record old = c->reader;
  Record next = mine;
  next.what |= mask | (update ? kWritten : 0);
  c->reader = next;
  if (old.group == mine.group) {
    uint64_t x = old.what ^ mine.what;
    if ((x & kThread) == 0) {
      if (!((x | old.what) & kAtomic)) c->reader.what |= old.what & kMask;
      return;
    }
    if ((x & kEpoch) != 0 && !device) return;  // ordered before everything to come
    if ((x & kThreadSimdgroup) == 0) {
      c->same = old;
    } else {
      c->other = old;
    }
  } else if (device && old.group) {
    c->other = old;
  }
}

static MG_ALWAYS_INLINE void check_write(Cell *c, const Access &a, const Record &mine, uint64_t mask,
                                         bool device) {
  if (MG_UNLIKELY(conflicts(c->writer, mine, mask, device))) report_race(a, mine, c->writer, true);
  if (MG_UNLIKELY(conflicts(c->reader, mine, mask, device))) report_race(a, mine, c->reader, false);
  if (MG_UNLIKELY(conflicts(c->same, mine, mask, device))) report_race(a, mine, c->same, false);
  if (MG_UNLIKELY(conflicts(c->other, mine, mask, device))) report_race(a, mine, c->other, false);
  uint64_t written = device || c->writer.group == mine.group ? c->writer.what & kWritten : 0;
  c->writer = mine;
  c->writer.what |= mask | written | (mask << (kWrittenShift - kMaskShift));
}

// Every two bytes of the access, with the mask of those it touches.
template <typename Check>
static MG_ALWAYS_INLINE void each_cell(Cell *cells, uint64_t offset, uint32_t bytes, Check check) {
  if (MG_LIKELY(!(offset & 1) && !(bytes & 1))) {
    Cell *c = cells + offset / 2;
    for (uint32_t i = 0; i < bytes / 2; ++i) check(c + i, kMask);
    return;
  }
  for (uint64_t at = offset; at < offset + bytes; ++at)
    check(cells + at / 2, (uint64_t)1 << (kMaskShift + (at & 1)));
}

static MG_ALWAYS_INLINE void check_cells(Cell *cells, uint64_t offset, const Access &a,
                                         const Record &mine, bool device, bool initialised) {
  bool reads = a.access == MG_READ || a.access == MG_ATOMIC_READ || a.access == MG_ATOMIC_UPDATE;
  bool writes = a.access == MG_WRITE || a.access == MG_ATOMIC_WRITE || a.access == MG_ATOMIC_UPDATE;
  each_cell(cells, offset, a.bytes, [&](Cell *c, uint64_t mask) __attribute__((always_inline)) {
    if (reads) check_read(c, a, mine, mask, device, initialised);
    if (writes) check_write(c, a, mine, mask, device);
  });
}

// The variable or buffer nearest to an address that belongs to none.
__attribute__((noinline, cold)) static char *out_of_bounds(Access a, uint32_t code) {
  uint64_t best = ~0ull;
  for (uint32_t i = 0; i < buffer_total && a.space != MG_SPACE_THREADGROUP; ++i) {
    const Buffer &b = buffers[i];
    uint64_t distance = a.address < b.begin ? b.begin - a.address
                        : a.address >= b.end ? a.address - b.end + 1 : 0;
    if (distance < best) {
      best = distance;
      a.buffer = b.index;
      a.offset = (int64_t)(a.address - b.base);
      a.limit = b.end - b.base;
      if (a.space == MG_SPACE_NONE) a.space = MG_SPACE_DEVICE;
    }
  }
  uintptr_t arena_begin = (uintptr_t)arena;
  if (a.space == MG_SPACE_THREADGROUP ||
      (a.address >= arena_begin && a.address < arena_begin + kArenaBytes)) {
    best = ~0ull;
    a.space = MG_SPACE_THREADGROUP;
    a.buffer = ~0u;
    for (uint32_t i = 0; i < variable_count; ++i) {
      const Variable &v = variables[i];
      if (!v.bytes) continue;
      uintptr_t begin = arena_begin + v.offset, end = begin + v.bytes;
      uint64_t distance = a.address < begin ? begin - a.address
                          : a.address >= end ? a.address - end + 1 : 0;
      if (distance < best) {
        best = distance;
        a.buffer = i;
        a.offset = (int64_t)(a.address - begin);
        a.limit = v.bytes;
      }
    }
  }
  report_access(best <= (1ull << 30) ? MG_OUT_OF_BOUNDS : MG_WILD_ACCESS, a, code, 0);
  bool writes = a.access != MG_READ && a.access != MG_ATOMIC_READ;
  if (a.bytes > sizeof scratch) return (char *)a.address;  // no structure is that large
  if (!writes) memset(scratch_zero, 0, a.bytes);
  return writes ? scratch : scratch_zero;
}

static MG_ALWAYS_INLINE void check_alignment(const Access &a, uint32_t alignment, uint32_t code) {
  if (MG_UNLIKELY(a.address & (alignment - 1))) {
    mg_finding *f = report_access(MG_MISALIGNED, a, code, 0);
    if (f) f->value = alignment;
  }
}

static MG_ALWAYS_INLINE char *access_threadgroup(uintptr_t p, uint32_t bytes, uint32_t alignment,
                                                 uint32_t access, uint32_t code) {
  access_number++;
  uint64_t offset = p - (uintptr_t)arena;
  Access a = {p, bytes, access, MG_SPACE_THREADGROUP, ~0u, 0, 0};
  if (MG_UNLIKELY(offset >= kArenaBytes)) return out_of_bounds(a, code);
  uint32_t owner = arena_owner[offset / 16];
  if (MG_UNLIKELY(owner == 0)) return out_of_bounds(a, code);
  a.buffer = (owner & ~(uint32_t)kPartly) - 1;
  if (MG_UNLIKELY((owner & kPartly) || offset % 16 + bytes > 16)) {
    const Variable &v = variables[a.buffer];
    if (offset + bytes > v.offset + v.bytes) return out_of_bounds(a, code);
  }
  check_alignment(a, alignment, code);
  bool atomic = access >= MG_ATOMIC_READ;
  count_access(MG_THREADGROUP_MEMORY, access, bytes, offset);
  count_pattern(MG_THREADGROUP_MEMORY, code, p, bytes);
  check_cells(arena_cells, offset, a, record(kThreadgroup, code, atomic), false, false);
  return (char *)p;
}

static MG_ALWAYS_INLINE Buffer *find_buffer(uintptr_t p) {
  Buffer *b = &buffers[last_buffer];
  if (MG_LIKELY(p >= b->begin && p < b->end)) return b;
  for (uint32_t i = 0; i < buffer_total; ++i) {
    if (p >= buffers[i].begin && p < buffers[i].end) {
      last_buffer = i;
      return &buffers[i];
    }
  }
  return nullptr;
}

static char *access_device(uintptr_t p, uint32_t bytes, uint32_t alignment, uint32_t access,
                           uint32_t space, uint32_t code) {
  access_number++;
  Access a = {p, bytes, access, space, ~0u, 0, 0};
  Buffer *b = buffer_total ? find_buffer(p) : nullptr;
  if (MG_UNLIKELY(!b)) {
    // Constants of the program, and the stand-in for an absent buffer, belong to the object itself.
    if (p >= image_base() && p < image_end() && !((uintptr_t)arena <= p && p < (uintptr_t)arena + kArenaBytes))
      return (char *)p;
    return out_of_bounds(a, code);
  }
  if (!a.space) a.space = MG_SPACE_DEVICE;
  a.buffer = b->index;
  a.offset = (int64_t)(p - b->base);
  a.limit = b->end - b->base;
  if (MG_UNLIKELY(p + bytes > b->end)) return out_of_bounds(a, code);
  check_alignment(a, alignment, code);
  bool writes = access != MG_READ && access != MG_ATOMIC_READ;
  if (MG_UNLIKELY(writes && !(b->flags & MG_BUFFER_WRITABLE))) {
    report_access(MG_READ_ONLY, a, code, 0);
    return scratch;
  }
  uint64_t offset = p - b->begin;
  count_access(b->index, access, bytes, offset);
  count_pattern(b->index, code, p, bytes);
  if (b->cells)
    check_cells(b->cells, offset, a, record(kDevice, code, access >= MG_ATOMIC_READ), true,
                (b->flags & MG_BUFFER_INITIALISED) != 0);
  return (char *)p;
}

static MG_ALWAYS_INLINE char *access_any(uintptr_t p, uint32_t bytes, uint32_t alignment,
                                         uint32_t access, uint32_t code) {
  if (MG_LIKELY(p >= (uintptr_t)stacks_begin && p < (uintptr_t)stacks_end)) return (char *)p;
  if (p - (uintptr_t)arena < kArenaBytes) return access_threadgroup(p, bytes, alignment, access, code);
  return access_device(p, bytes, alignment, access, MG_SPACE_NONE, code);
}

extern "C" {
#define MG_HOOKS(name, access)                                                                       \
  char *mg_##name##_device(uintptr_t p, uint32_t info) {                                             \
    return access_device(p, info & 0xffff, info >> 16, access, MG_SPACE_DEVICE, code_of(MG_CALLER())); \
  }                                                                                                  \
  char *mg_##name##_constant(uintptr_t p, uint32_t info) {                                           \
    return access_device(p, info & 0xffff, info >> 16, access, MG_SPACE_CONSTANT, code_of(MG_CALLER())); \
  }                                                                                                  \
  char *mg_##name##_threadgroup(uintptr_t p, uint32_t info) {                                        \
    return access_threadgroup(p, info & 0xffff, info >> 16, access, code_of(MG_CALLER()));           \
  }                                                                                                  \
  char *mg_##name##_any(uintptr_t p, uint32_t info) {                                                \
    return access_any(p, info & 0xffff, info >> 16, access, code_of(MG_CALLER()));                   \
  }                                                                                                  \
  char *mg_##name##_range(uintptr_t p, uint64_t bytes, uint32_t alignment) {                         \
    return access_any(p, (uint32_t)bytes, alignment, access, code_of(MG_CALLER()));                  \
  }
MG_HOOKS(read, MG_READ)
MG_HOOKS(write, MG_WRITE)

void mg_atomic_access(uint64_t p, uint32_t bytes, uint32_t kind) {
  uint32_t access = kind == 1 ? MG_ATOMIC_READ : kind == 2 ? MG_ATOMIC_WRITE : MG_ATOMIC_UPDATE;
  access_any((uintptr_t)p, bytes, bytes, access, code_of(MG_CALLER()));
}

void mg_count_exponential(uint32_t n) { report->exponentials += n; }

// --- undefined integer arithmetic ---------------------------------------------------------------

static void undefined(uint32_t what, uintptr_t site) {
  access_number++;
  mg_finding *f = find(MG_UNDEFINED, code_of(site), what, current);
  if (!f) return;
  f->value = what;
  f->other_address = 0;
}

uint64_t mg_divisor(int64_t left, int64_t right, uint32_t kind) {
  uint32_t bits = kind & 127;
  bool overflow = (kind & 128) && right == -1 && left == (int64_t)(~0ull << (bits - 1));
  if (MG_LIKELY(right != 0 && !overflow)) return (uint64_t)right;
  undefined(right == 0 ? MG_DIVISION : MG_SIGNED_OVERFLOW, MG_CALLER());
  return 1;
}
void mg_shift(uint64_t count, uint32_t width) {
  if (MG_UNLIKELY(count >= width)) undefined(MG_SHIFT, MG_CALLER());
}
void __ubsan_handle_add_overflow() { undefined(MG_SIGNED_OVERFLOW, MG_CALLER()); }
void __ubsan_handle_sub_overflow() { undefined(MG_SIGNED_OVERFLOW, MG_CALLER()); }
void __ubsan_handle_mul_overflow() { undefined(MG_SIGNED_OVERFLOW, MG_CALLER()); }
void __ubsan_handle_negate_overflow() { undefined(MG_SIGNED_OVERFLOW, MG_CALLER()); }
void __ubsan_handle_divrem_overflow() { undefined(MG_DIVISION, MG_CALLER()); }
void __ubsan_handle_out_of_bounds() { undefined(MG_ARRAY_INDEX, MG_CALLER()); }
void __ubsan_handle_shift_out_of_bounds() { undefined(MG_SHIFT, MG_CALLER()); }
}
