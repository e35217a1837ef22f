#include "scheduler.h"

#include "checker.h"
#include "memory.h"

extern "C" {
Lane *mg_current;
uintptr_t mg_site;
Fibre *mg_from, *mg_to;
}
MG_ENTER_STUB;
Threadgroup group;
const mg_launch *launch;
mg_report *report;

static Lane lanes[kMaxThreads];
static Simdgroup simdgroups[kMaxThreads / kLanes];
static Fibre main_fibre;
static uint32_t barrier_flags;

Simdgroup *simdgroup_at(uint32_t index) { return &simdgroups[index]; }
static uint64_t random_state;

static inline uint64_t next_random() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

static inline uint32_t choose(uint32_t mask, uint32_t after) {
  if (MG_UNLIKELY(random_state != 0)) after = next_random() & 31;
  uint32_t later = mask & (uint32_t)(~0ull << (after + 1));
  return (uint32_t)__builtin_ctz(later ? later : mask);
}

static MG_ALWAYS_INLINE void switch_to(Lane *to) {
  mg_from = &current->fibre;
  mg_to = &to->fibre;
  current = to;
}

// The lanes that take part in the next collective of a simdgroup in which no lane can run.
static uint32_t take_collective(Simdgroup *s) {
  uint32_t active = s->at_collective;
  if (MG_UNLIKELY(s->mixed)) {
    uintptr_t lowest = ~(uintptr_t)0;
    for (uint32_t m = active; m; m &= m - 1) {
      uintptr_t site = s->lanes[__builtin_ctz(m)].site;
      if (site < lowest) lowest = site;
    }
    uint32_t others = 0;
    for (uint32_t m = active; m; m &= m - 1) {
      uint32_t i = (uint32_t)__builtin_ctz(m);
      if (s->lanes[i].site != lowest) others |= 1u << i;
    }
    active &= ~others;
    s->at_collective = others;
    s->mixed = 0;
    uintptr_t site = 0;
    for (uint32_t m = others; m; m &= m - 1) {
      uintptr_t here = s->lanes[__builtin_ctz(m)].site;
      if (site && here != site) s->mixed = 1;
      site = here;
    }
    s->site = site;
  } else {
    s->at_collective = 0;
  }
  return active;
}

static void release_barrier() {
  group.waiting_simdgroups = 0;
  report->threadgroup_barriers++;
  uintptr_t site = 0;
  uint32_t came = 0;
  Lane *last = nullptr;
  for (uint32_t i = 0; i < group.simdgroup_count; ++i) {
    Simdgroup *s = &simdgroups[i];
    if (s->at_barrier) report->thread_barriers++;
    came += (uint32_t)__builtin_popcount(s->at_barrier);
    for (uint32_t m = kChecked ? s->at_barrier : 0; m; m &= m - 1) {
      last = &s->lanes[__builtin_ctz(m)];
      if (site && last->site != site) finding_divergent_barrier(last, site, came);
      site = last->site;
    }
    s->runnable = s->at_barrier;
    s->at_barrier = 0;
  }
  if (kChecked && came != group.thread_count && last) finding_divergent_barrier(last, 0, came);
  check_barrier(barrier_flags, false, 0);
  barrier_flags = ~0u;
}

// The lane that runs when none of the current simdgroup can: of another simdgroup, or of the next
// phase when all wait at the barrier, or none when the threadgroup is done.
static Lane *next_lane_elsewhere(uint32_t from) {
  if (group.live_simdgroups == 0) return nullptr;
  if (group.waiting_simdgroups == group.live_simdgroups) release_barrier();
  uint32_t n = group.simdgroup_count;
  uint32_t start = random_state ? (uint32_t)(next_random() % n) : from;
  for (uint32_t k = 1; k <= n; ++k) {
    Simdgroup *s = &simdgroups[(start + k) % n];
    if (s->runnable) return &s->lanes[choose(s->runnable, 31)];
  }
  return nullptr;
}

// The current lane has left the runnable lanes: choose who runs now.
static MG_ALWAYS_INLINE void leave(Simdgroup *s, uint32_t lane) {
  if (MG_LIKELY(s->runnable)) {
    switch_to(&s->lanes[choose(s->runnable, lane)]);
    return;
  }
  if (MG_LIKELY(s->at_collective)) {
    uint32_t active = take_collective(s);
    if (kChecked) count_lanes(s, ~(s->at_collective | s->at_barrier));
    s->operations[__builtin_ctz(active)](s, active);
    s->runnable = active;
    // Simdgroups take turns, a collective each, as they do on hardware; a pseudo-random one when seeded.
    uint32_t n = group.simdgroup_count;
    uint32_t at = random_state ? (uint32_t)(next_random() % n) : s->index;
    Simdgroup *t = s;
    for (uint32_t k = 0; k < n; ++k) {
      at = at + 1 == n ? 0 : at + 1;
      if (simdgroups[at].runnable) {
        t = &simdgroups[at];
        break;
      }
    }
    switch_to(&t->lanes[choose(t->runnable, 31)]);
    return;
  }
  if (kChecked) count_lanes(s, ~0u);
  if (s->live) group.waiting_simdgroups++;
  Lane *next = next_lane_elsewhere(s->index);
  if (next) {
    switch_to(next);
    return;
  }
  mg_from = &current->fibre;
  mg_to = &main_fibre;
}

MG_ALWAYS_INLINE void collective(Operation operation) {
  Lane *me = current;
  Simdgroup *s = me->simdgroup;
  uintptr_t site = mg_site;
  me->site = site;
  if (s->at_collective == 0) {
    s->site = site;
  } else if (MG_UNLIKELY(s->site != site)) {
    s->mixed = 1;
  }
  s->operations[me->lane] = operation;
  s->at_collective |= me->bit;
  s->runnable &= ~me->bit;
  leave(s, me->lane);
}

extern "C" MG_WAITS void mg_arrive_threadgroup_barrier(uint32_t flags) {
  Lane *me = current;
  Simdgroup *s = me->simdgroup;
  me->site = mg_site;
  barrier_flags &= flags;
  s->at_barrier |= me->bit;
  s->runnable &= ~me->bit;
  leave(s, me->lane);
}

MG_STUB(threadgroup_barrier);

extern "C" MG_WAITS void mg_finish() __attribute__((visibility("hidden")));
extern "C" MG_WAITS void mg_arrive_finish() {
  Lane *me = current;
  Simdgroup *s = me->simdgroup;
  s->live &= ~me->bit;
  s->runnable &= ~me->bit;
  if (s->live == 0) group.live_simdgroups--;
  leave(s, me->lane);
}
MG_STUB(finish);

// clang asks here for the stack of arrays (-fsanitize=safe-stack).
extern "C" void **__safestack_pointer_address() { return &current->arrays; }

static void fibre_main() {
  mg_kernel(&current->identity);
  mg_finish();
  __builtin_trap();
}

static void fill(uint32_t *to, uint32_t x, uint32_t y, uint32_t z) {
  to[0] = x;
  to[1] = y;
  to[2] = z;
}

static void prepare_threadgroup(uint64_t linear, const uint32_t groups[3]) {
  uint32_t position[3] = {(uint32_t)(linear % groups[0]), (uint32_t)(linear / groups[0] % groups[1]),
                          (uint32_t)(linear / groups[0] / groups[1])};
  uint32_t size[3], base[3];
  for (int d = 0; d < 3; ++d) {
    base[d] = position[d] * launch->threadgroup[d];
    uint32_t left = launch->grid[d] - base[d];
    size[d] = left < launch->threadgroup[d] ? left : launch->threadgroup[d];
    group.position[d] = position[d];
  }
  group.linear = linear;
  group.thread_count = size[0] * size[1] * size[2];
  group.simdgroup_count = (group.thread_count + kLanes - 1) / kLanes;
  group.live_simdgroups = group.simdgroup_count;
  group.waiting_simdgroups = 0;
  barrier_flags = ~0u;
  uint32_t full = launch->threadgroup[0] * launch->threadgroup[1] * launch->threadgroup[2];
  uint32_t i = 0;
  for (uint32_t z = 0; z < size[2]; ++z)
    for (uint32_t y = 0; y < size[1]; ++y)
      for (uint32_t x = 0; x < size[0]; ++x, ++i) {
        Lane *l = &lanes[i];
        l->lane = i % kLanes;
        l->bit = 1u << l->lane;
        l->simdgroup = &simdgroups[i / kLanes];
        uint32_t q = l->lane / 4;
        l->element = ((q & 4) + (l->lane / 2) % 4) * 8 + (q & 2) * 2 + (l->lane % 2) * 2;
        l->result = l->simdgroup->result[l->lane];
        l->product = &l->simdgroup->products[0].a[0][0] + l->element;
        mg_thread &t = l->identity;
        const uint32_t *whole = launch->threadgroup, *grid = launch->grid;
        fill(t.thread_position_in_grid, base[0] + x, base[1] + y, base[2] + z);
        fill(t.thread_position_in_threadgroup, x, y, z);
        fill(t.threadgroup_position_in_grid, position[0], position[1], position[2]);
        fill(t.threads_per_threadgroup, size[0], size[1], size[2]);
        fill(t.dispatch_threads_per_threadgroup, whole[0], whole[1], whole[2]);
        fill(t.threads_per_grid, grid[0], grid[1], grid[2]);
        fill(t.threadgroups_per_grid, groups[0], groups[1], groups[2]);
        fill(t.grid_origin, 0, 0, 0);
        fill(t.thread_index_in_threadgroup, i, 0, 0);
        fill(t.thread_index_in_simdgroup, i % kLanes, 0, 0);
        fill(t.simdgroup_index_in_threadgroup, i / kLanes, 0, 0);
        fill(t.simdgroups_per_threadgroup, group.simdgroup_count, 0, 0);
        fill(t.dispatch_simdgroups_per_threadgroup, (full + kLanes - 1) / kLanes, 0, 0);
        fill(t.threads_per_simdgroup, kLanes, 0, 0);
        fill(t.thread_execution_width, kLanes, 0, 0);
        fill(t.quadgroup_index_in_threadgroup, i / 4, 0, 0);
        fill(t.thread_index_in_quadgroup, i % 4, 0, 0);
        fill(t.quadgroups_per_threadgroup, (group.thread_count + 3) / 4, 0, 0);
        fill(t.grid_size, grid[0], grid[1], grid[2]);
        l->arrays = array_stack_top(i);
        fibre_prepare(&l->fibre, stack_top(i), fibre_main);
      }
  for (uint32_t s = 0; s < group.simdgroup_count; ++s) {
    uint32_t count = group.thread_count - s * kLanes;
    uint32_t mask = count >= kLanes ? ~0u : (1u << count) - 1;
    simdgroups[s].all = simdgroups[s].live = simdgroups[s].runnable = mask;
    simdgroups[s].at_collective = simdgroups[s].at_barrier = 0;
    simdgroups[s].mixed = 0;
    simdgroups[s].index = s;
    simdgroups[s].lanes = &lanes[s * kLanes];
  }
}

extern "C" int mg_run(const mg_launch *l) {
  launch = l;
  if (l->report_bytes < sizeof(mg_report) + sizeof(mg_buffer_counters) * (MG_MAX_BUFFERS + 1))
    return MG_STATUS_BAD_LAUNCH;
  report = (mg_report *)l->report;
  report_begin();
  uint64_t threads = (uint64_t)l->threadgroup[0] * l->threadgroup[1] * l->threadgroup[2];
  uint32_t groups[3];
  bool empty = threads == 0 || threads > kMaxThreads || l->step == 0;
  for (int d = 0; d < 3; ++d) {
    empty |= l->grid[d] == 0;
    groups[d] = empty ? 1 : (l->grid[d] + l->threadgroup[d] - 1) / l->threadgroup[d];
  }
  if (empty) return (int)(report->status = MG_STATUS_BAD_LAUNCH);
  if (!memory_begin((uint32_t)threads) || !check_begin()) {
    check_end();
    memory_end();
    return (int)(report->status = MG_STATUS_OUT_OF_MEMORY);
  }
  report->status = MG_STATUS_RUNNING;
  random_state = l->seed * 0x9e3779b97f4a7c15ull;
  for (uint64_t g = l->first_group; g < l->end_group; g += l->step) {
    prepare_threadgroup(g, groups);
    check_threadgroup_begin();
    Lane *first = next_lane_elsewhere(group.simdgroup_count - 1);
    current = first;
    mg_from = &main_fibre;
    mg_to = &first->fibre;
    mg_enter();
    check_threadgroup_end();
    report->threadgroups++;
    report->threads += group.thread_count;
    if (l->progress) __atomic_fetch_add(l->progress, 1, __ATOMIC_RELAXED);
  }
  check_end();
  memory_end();
  report->status = MG_STATUS_DONE;
  return report->finding_count ? 1 : 0;
}
