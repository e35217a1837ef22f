#include "memory.h"

#include "checker.h"

Variable variables[kMaxVariables];
uint32_t variable_count;
uint64_t arena_used;
char *arena;
char *stacks_begin, *stacks_end;
extern "C" {
alignas(64) char mg_dummy_buffer[4096];  // what an absent buffer is bound to
#if defined(__APPLE__)
extern const char _mh_dylib_header[] __attribute__((visibility("hidden")));
#else
extern const char __ehdr_start[] __attribute__((visibility("hidden")));
extern char _end[] __attribute__((visibility("hidden")));
#endif
}

// A fibre's memory, from its lowest address: no access, the stack of its arrays, no access, its own
// stack. The first gap is wide because a large array may jump far; own stacks are probed page by page.
static uint64_t stack_bytes, fibre_bytes;
static const uint64_t kPage = 65536;  // a multiple of every page size in use
static const uint64_t kArrayGap = 1 << 20;
alignas(64) static char arena_memory[kArenaBytes];
static uint64_t threadgroup_bytes;
static char *signal_stack;

#if defined(__APPLE__)
uintptr_t image_base() { return (uintptr_t)_mh_dylib_header; }
uintptr_t image_end() { return image_base() + (64 << 20); }  // Mach-O has no symbol for it
#else
uintptr_t image_base() { return (uintptr_t)__ehdr_start; }
uintptr_t image_end() { return (uintptr_t)_end; }
#endif

char *stack_top(uint32_t thread) {
  return stacks_begin + (uint64_t)(thread + 1) * fibre_bytes;
}
char *array_stack_top(uint32_t thread) { return stack_top(thread) - stack_bytes - kPage - 256; }

extern "C" uint64_t mg_buffer_address(uint32_t index) {
  if (index < launch->buffer_count && launch->buffers[index].base)
    return (uint64_t)(uintptr_t)launch->buffers[index].base;
  return (uint64_t)(uintptr_t)mg_dummy_buffer;
}

extern "C" uint64_t mg_threadgroup_variable(uint32_t id, uint64_t bytes, uint64_t alignment) {
  if (MG_UNLIKELY(id >= kMaxVariables)) __builtin_trap();
  Variable *v = &variables[id];
  if (MG_UNLIKELY(v->bytes == 0)) {
    if (alignment < 16) alignment = 16;
    uint64_t at = (arena_used + alignment - 1) & ~(alignment - 1);
    v->bytes = bytes ? bytes : 1;
    v->offset = at;
    if (at + bytes + 2 * kRedZone > kArenaBytes) __builtin_trap();
    arena_used = at + bytes + (kChecked ? kRedZone : 0);
    if (id >= variable_count) variable_count = id + 1;
    threadgroup_bytes = ((threadgroup_bytes + alignment - 1) & ~(alignment - 1)) + bytes;
    if (threadgroup_bytes > report->threadgroup_bytes) report->threadgroup_bytes = threadgroup_bytes;
    check_variable(v);
  }
  return (uint64_t)(uintptr_t)(arena + v->offset);
}

extern "C" uint64_t mg_threadgroup_argument(uint32_t index) {
  uint64_t bytes = index < MG_THREADGROUP_ARGUMENTS ? launch->threadgroup_bytes[index] : 0;
  return mg_threadgroup_variable(kMaxVariables - 1 - index, bytes, 16);
}
extern "C" uint32_t mg_lane() { return current->lane; }
extern "C" void mg_log(const char *) {}

void *map_memory(uint64_t bytes) {
  void *p = mmap(nullptr, bytes, kProtReadWrite, kMapPrivateAnonymous | kMapNoReserve, -1, 0);
  return p == (void *)-1 ? nullptr : p;
}

void report_begin() {
  memset(report, 0, sizeof(mg_report));
  memcpy(report->magic, "MGREPORT", 8);
  report->version = MG_REPORT_VERSION;
  report->checked = kChecked;
  report->buffer_counters = (sizeof(mg_report) + 63) & ~63ull;
  uint64_t counters = sizeof(mg_buffer_counters) * (MG_MAX_BUFFERS + 1);
  memset((char *)report + report->buffer_counters, 0, counters);
  report->findings = (report->buffer_counters + counters + 63) & ~63ull;
  report->finding_capacity =
      launch->report_bytes > report->findings
          ? (uint32_t)((launch->report_bytes - report->findings) / sizeof(mg_finding))
          : 0;
}

// Kernel structures of sigaction and sigaltstack as the C libraries of Linux lay them out.
#if defined(__APPLE__)
struct Action {
  void *handler;
  uint32_t mask;
  int flags;
};
enum { kSigInfo = 0x40, kOnStack = 1, kResetHandler = 4, kSigBus = 10 };
struct AltStack {
  void *sp;
  size_t size;
  int flags;
};
#else
struct Action {
  void *handler;
  uint64_t mask[16];
  int flags;
  void *restorer;
};
enum { kSigInfo = 4, kOnStack = 0x08000000, kResetHandler = (int)0x80000000, kSigBus = 7 };
struct AltStack {
  void *sp;
  int flags;
  size_t size;
};
#endif
enum { kSigIll = 4, kSigTrap = 5, kSigFpe = 8, kSigSegv = 11, kSignalStackBytes = 65536 };

static void on_signal(int signal, char *info, char *context) {
  uintptr_t where = *(uintptr_t *)(info + 16);
  uintptr_t ip = 0;
#if defined(__linux__) && defined(__x86_64__)
  ip = *(uintptr_t *)(context + 40 + 16 * 8);  // uc_mcontext.gregs[REG_RIP]
#elif defined(__linux__) && defined(__aarch64__)
  ip = *(uintptr_t *)(context + 176 + 8 + 32 * 8);  // uc_mcontext.pc
#else
  (void)context;
#endif
  if (report && report->status == MG_STATUS_RUNNING) {
    bool in_stacks = (signal == kSigSegv || signal == kSigBus) && where >= (uintptr_t)stacks_begin &&
                     where < (uintptr_t)stacks_end;
    report->fatal_signal = (uint32_t)signal;
    report->fatal_memory = where;
    report->fatal_address = ip - image_base();
    if (current) {
      memcpy(report->fatal_thread, current->identity.thread_position_in_threadgroup, 12);
      memcpy(report->fatal_threadgroup, group.position, 12);
    }
    report->status = in_stacks ? MG_STATUS_STACK_OVERFLOW : MG_STATUS_CRASH;
  }
  raise(signal);  // the default action is back: the process dies of it
}

bool memory_begin(uint32_t threads) {
  stack_bytes = launch->fibre_stack_bytes ? launch->fibre_stack_bytes : 256 << 10;
  stack_bytes = (stack_bytes + kPage - 1) & ~(kPage - 1);
  fibre_bytes = kArrayGap + stack_bytes + kPage + stack_bytes;
  uint64_t total = threads * fibre_bytes + kPage;
  char *p = (char *)mmap(nullptr, total, kProtNone, kMapPrivateAnonymous | kMapNoReserve, -1, 0);
  if (p == (char *)-1) return false;
  stacks_begin = p;
  stacks_end = p + total;
  for (uint32_t i = 0; i < threads; ++i) {
    char *arrays = p + i * fibre_bytes + kArrayGap, *own = arrays + stack_bytes + kPage;
    if (mprotect(arrays, stack_bytes, kProtReadWrite) || mprotect(own, stack_bytes, kProtReadWrite))
      return false;
  }
  if (!signal_stack) {
    signal_stack = (char *)mmap(nullptr, kSignalStackBytes, kProtReadWrite, kMapPrivateAnonymous, -1, 0);
    if (signal_stack == (char *)-1) return false;
  }
  AltStack alt = {};
  alt.sp = signal_stack;
  alt.size = kSignalStackBytes;
  sigaltstack(&alt, nullptr);
  Action action = {};
  action.handler = (void *)on_signal;
  action.flags = kSigInfo | kOnStack | kResetHandler;
  const int signals[] = {kSigIll, kSigTrap, kSigFpe, kSigBus, kSigSegv};
  for (int s : signals) sigaction(s, &action, nullptr);
  arena = arena_memory;
  memset(variables, 0, sizeof variables);
  variable_count = 0;
  arena_used = kChecked ? kRedZone : 0;
  threadgroup_bytes = 0;
  return true;
}

void memory_end() {
  if (stacks_begin) munmap(stacks_begin, (size_t)(stacks_end - stacks_begin));
  stacks_begin = stacks_end = nullptr;
}
