#include "counters.h"

TouchMap touched[MG_MAX_BUFFERS];
mg_buffer_counters *buffer_counters;

bool counters_begin(const mg_launch *l) {
  buffer_counters = (mg_buffer_counters *)((char *)report + report->buffer_counters);
  memset(touched, 0, sizeof touched);
  for (uint32_t i = 0; i < l->buffer_count && i < MG_MAX_BUFFERS; ++i) {
    if (!l->buffers[i].base) continue;
    uint64_t words = (l->buffers[i].bytes + l->buffers[i].lead + 63) / 64 + 1;
    void *map = mmap(nullptr, words * 16, kProtReadWrite, kMapPrivateAnonymous | kMapNoReserve, -1, 0);
    if (map == (void *)-1) return false;
    touched[i] = TouchMap{(uint64_t *)map, (uint64_t *)map + words, words};
  }
  return true;
}

void counters_end() {
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
