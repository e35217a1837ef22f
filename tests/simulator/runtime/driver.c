// Runs one kernel on buffers from standard input, without Python: the runtime's test on a processor
// that this machine only emulates. Arguments: grid.x threadgroup.x seed bytes-of-buffer-0 ...
// Each buffer's bytes come on standard input and go, after the run, to standard output; then one line
// on standard error says what mg_run returned, how many findings there are, and each one's kind.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
  void *base;
  uint64_t bytes;
  uint32_t flags, pad;
  uint64_t lead;
} mg_buffer;
typedef struct {
  uint32_t grid[3], threadgroup[3];
  uint64_t first_group, end_group, step;
  uint32_t buffer_count;
  mg_buffer *buffers;
  uint64_t fibre_stack_bytes, seed;
  void *report;
  uint64_t report_bytes;
  volatile uint64_t *progress;
  uint32_t threadgroup_bytes[31];
} mg_launch;
int mg_run(const mg_launch *);

static char report[1 << 20];

int main(int argc, char **argv) {
  mg_buffer buffers[31];
  mg_launch launch = {{0, 1, 1}, {0, 1, 1}, 0, 0, 1, (uint32_t)argc - 4, buffers};
  launch.grid[0] = (uint32_t)atoi(argv[1]);
  launch.threadgroup[0] = (uint32_t)atoi(argv[2]);
  launch.end_group = (launch.grid[0] + launch.threadgroup[0] - 1) / launch.threadgroup[0];
  launch.seed = (uint64_t)atoll(argv[3]);
  launch.report = report;
  launch.report_bytes = sizeof report;
  for (int i = 0; i < argc - 4; ++i) {
    uint64_t bytes = (uint64_t)atoll(argv[4 + i]);
    void *base = aligned_alloc(4096, (bytes + 8191) / 4096 * 4096);
    if (fread(base, 1, bytes, stdin) != bytes) return 99;
    buffers[i] = (mg_buffer){base, bytes, 3, 0, 0};
  }
  int code = mg_run(&launch);
  for (int i = 0; i < argc - 4; ++i) fwrite(buffers[i].base, 1, buffers[i].bytes, stdout);
  uint64_t findings;
  uint32_t count;
  memcpy(&findings, report + 24, 8);
  memcpy(&count, report + 32, 4);
  fprintf(stderr, "%d %u", code, count);
  for (uint32_t i = 0; i < count; ++i) {
    uint32_t kind;
    memcpy(&kind, report + findings + 136 * i, 4);
    fprintf(stderr, " %u", kind);
  }
  fprintf(stderr, "\n");
  return 0;
}
