#include "counters.h"

TouchMap touched[MG_MAX_BUFFERS];
mg_buffer_counters *buffer_counters;

LogRow *log_rows;
uint32_t log_lengths[kMaxThreads];
static uint64_t log_bytes;

// The accesses of one simdgroup together: n of them, each of `bytes`.
struct Together {
  uint64_t address[kLanes];
  uint32_t n, bytes;
};

// The units of 2^shift bytes that the accesses touch, relative to the lowest; false when they lie
// too far apart for the map.
enum { kMapWords = 128 };
struct UnitMap {
  uint32_t words[kMapWords];
  uint32_t used;
};
static bool map_units(const Together &t, uint32_t shift, UnitMap &map) {
  uint64_t lowest = ~0ull, highest = 0;
  for (uint32_t i = 0; i < t.n; ++i) {
    lowest = t.address[i] < lowest ? t.address[i] : lowest;
    highest = t.address[i] > highest ? t.address[i] : highest;
  }
  uint64_t first = lowest >> shift & ~31ull, last = (highest + t.bytes - 1) >> shift;
  if (last - first >= kMapWords * 32) return false;
  map.used = (uint32_t)(last - first) / 32 + 1;
  for (uint32_t i = 0; i < map.used; ++i) map.words[i] = 0;
  for (uint32_t i = 0; i < t.n; ++i) {
    uint64_t from = (t.address[i] >> shift) - first, to = ((t.address[i] + t.bytes - 1) >> shift) - first;
    for (uint64_t u = from; u <= to; ++u) map.words[u / 32] |= 1u << (u % 32);
  }
  return true;
}

// The different units that the accesses touch, one by one: for those that lie far apart.
static uint32_t list_units(const Together &t, uint32_t shift, uint64_t *units, uint32_t capacity) {
  uint32_t found = 0;
  for (uint32_t i = 0; i < t.n; ++i) {
    uint64_t last = (t.address[i] + t.bytes - 1) >> shift;
    for (uint64_t u = t.address[i] >> shift; u <= last && found < capacity; ++u) {
      uint32_t k = found;
      while (k > 0 && units[k - 1] != u) --k;
      if (k == 0) units[found++] = u;
    }
  }
  return found;
}

// Lines of 128 bytes that the accesses touch together.
static uint32_t count_lines(const Together &t) {
  UnitMap map;
  if (map_units(t, 7, map)) {
    uint32_t lines = 0;
    for (uint32_t i = 0; i < map.used; ++i) lines += (uint32_t)__builtin_popcount(map.words[i]);
    return lines;
  }
  uint64_t lines[512];
  return list_units(t, 7, lines, 512);
}

// Passes beyond the fewest that 32 banks of four bytes need for the accesses together.
static uint32_t count_conflicts(const Together &t) {
  uint32_t total = 0, deepest = 0;
  UnitMap map;
  if (map_units(t, 2, map)) {
    // Bit b of planes[p] is bit p of the number of words in bank b.
    uint32_t planes[8] = {};
    for (uint32_t i = 0; i < map.used; ++i) {
      uint32_t carry = map.words[i];
      total += (uint32_t)__builtin_popcount(carry);
      for (uint32_t p = 0; carry; ++p) {
        uint32_t both = planes[p] & carry;
        planes[p] ^= carry;
        carry = both;
      }
    }
    uint32_t among = ~0u;
    for (int p = 7; p >= 0; --p) {
      if (!(among & planes[p])) continue;
      among &= planes[p];
      deepest |= 1u << p;
    }
  } else {
    uint64_t words[512];
    uint32_t banks[32] = {};
    total = list_units(t, 2, words, 512);
    for (uint32_t i = 0; i < total; ++i) {
      uint32_t depth = ++banks[words[i] % 32];
      deepest = depth > deepest ? depth : deepest;
    }
  }
  return deepest - (total + 31) / 32;
}

static MG_ALWAYS_INLINE void count_together(uint32_t what, Together &t) {
  uint32_t buffer = what & 255;
  t.bytes = what >> 8;
  if (buffer == MG_THREADGROUP_MEMORY) {
    report->bank_accesses++;
    report->bank_conflicts += count_conflicts(t);
  } else {
    buffer_counters[buffer].simdgroup_accesses++;
    buffer_counters[buffer].lines += count_lines(t);
  }
}

void count_lanes(Simdgroup *s, uint32_t lanes) {
  const LogRow *rows = log_rows + (uint64_t)s->index * kLogRows;
  uint32_t *lengths = &log_lengths[s->index * kLanes];
  uint32_t at[kLanes] = {}, left = 0, row = 0;
  for (uint32_t i = 0; i < kLanes; ++i)
    if (lengths[i] && (lanes >> i & 1)) left |= 1u << i;
  uint32_t all = left;
  Together t;
  // As long as every lane goes the same way, a row is an access of the simdgroup.
  if (left == ~0u) {
    uint32_t shortest = lengths[0];
    for (uint32_t i = 1; i < kLanes; ++i) shortest = lengths[i] < shortest ? lengths[i] : shortest;
    for (; row < shortest; ++row) {
      const LogRow &r = rows[row];
      uint32_t differ = 0;
      const Logged &first = r.lanes[0];
      for (uint32_t i = 1; i < kLanes; ++i)
        differ |= (r.lanes[i].code ^ first.code) | (r.lanes[i].what ^ first.what);
      if (differ) break;
      for (uint32_t i = 0; i < kLanes; ++i) t.address[i] = r.lanes[i].address;
      t.n = kLanes;
      count_together(first.what, t);
    }
    for (uint32_t i = 0; i < kLanes; ++i) {
      at[i] = row;
      if (row == lengths[i]) left &= ~(1u << i);
    }
  }
  // Lanes that took another way are behind or ahead: the lowest instruction goes first.
  while (left) {
    uint32_t code = ~0u, what = 0;
    for (uint32_t m = left; m; m &= m - 1) {
      uint32_t i = (uint32_t)__builtin_ctz(m);
      const Logged &next = rows[at[i]].lanes[i];
      if (next.code < code) {
        code = next.code;
        what = next.what;
      }
    }
    t.n = 0;
    for (uint32_t m = left; m; m &= m - 1) {
      uint32_t i = (uint32_t)__builtin_ctz(m);
      const Logged &next = rows[at[i]].lanes[i];
      if (next.code != code || next.what != what) continue;
      t.address[t.n++] = next.address;
      if (++at[i] == lengths[i]) left &= ~(1u << i);
    }
    count_together(what, t);
  }
  for (uint32_t m = all; m; m &= m - 1) lengths[__builtin_ctz(m)] = 0;
}

bool counters_begin(const mg_launch *l) {
  uint64_t threads = (uint64_t)l->threadgroup[0] * l->threadgroup[1] * l->threadgroup[2];
  uint64_t needed = (threads + kLanes - 1) / kLanes * kLogRows * sizeof(LogRow);
  log_bytes = needed;
  log_rows = (LogRow *)map_memory(log_bytes);
  if (!log_rows) return false;
  memset(log_lengths, 0, sizeof log_lengths);
  buffer_counters = (mg_buffer_counters *)((char *)report + report->buffer_counters);
  memset(touched, 0, sizeof touched);
  for (uint32_t i = 0; i < l->buffer_count && i < MG_MAX_BUFFERS; ++i) {
    if (!l->buffers[i].base) continue;
    uint64_t words = (l->buffers[i].bytes + l->buffers[i].lead + 63) / 64 + 1;
    uint64_t *map = (uint64_t *)map_memory(words * 16);
    if (!map) return false;
    touched[i] = TouchMap{map, map + words, words};
  }
  return true;
}

void counters_end() {
  if (log_rows) munmap(log_rows, log_bytes);
  log_rows = nullptr;
  for (uint32_t i = 0; i < MG_MAX_BUFFERS; ++i) {
    TouchMap &t = touched[i];
    for (uint64_t w = 0; w < t.words; ++w) {
      buffer_counters[i].distinct_read += (uint64_t)__builtin_popcountll(t.read[w]);
      buffer_counters[i].distinct_written += (uint64_t)__builtin_popcountll(t.written[w]);
    }
    if (t.words) munmap(t.read, t.words * 16);
    t = TouchMap{};
  }
}
