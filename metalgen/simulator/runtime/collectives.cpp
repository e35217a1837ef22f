// Collectives: each lane leaves its operands in the simdgroup and waits; the last to come computes
// every lane's result. Nothing here allocates.
#include "checker.h"
#include "scheduler.h"

enum Shuffle : uint32_t {
  kByLane, kByXor, kUp, kDown, kRotateUp, kRotateDown, kFirst, kFillUp, kFillDown, kQuad = 16
};

// The lane that a lane reads in a shuffle; lanes + itself: its filling value; -1: none, keeps its own.
static inline int source_lane(uint32_t kind, uint32_t lane, uint32_t argument, uint32_t modulo,
                              uint32_t active) {
  uint32_t width = (kind & kQuad) ? 4 : 32, base = lane & ~(width - 1), in = lane - base;
  switch (kind & 15) {
    case kByLane: return argument < width ? (int)(base + argument) : -2;
    case kByXor: {
      uint32_t to = in ^ argument;
      return to < width ? (int)(base + to) : -2;
    }
    case kUp: return argument <= in ? (int)(lane - argument) : -1;
    case kDown: return in + argument < width ? (int)(lane + argument) : -1;
    case kRotateUp: return (int)(base + ((in - argument) & (width - 1)));
    case kRotateDown: return (int)(base + ((in + argument) & (width - 1)));
    case kFirst: {
      uint32_t mine = width == 4 ? active & (15u << base) : active;
      return __builtin_ctz(mine);
    }
    case kFillUp: {  // lanes below the segment's start read the filling values of its end
      uint32_t segment = in & ~(modulo - 1), at = in - segment;
      return at >= argument ? (int)(lane - argument)
                            : (int)(kLanes + base + segment + ((at - argument) & (modulo - 1)));
    }
    case kFillDown: {
      uint32_t segment = in & ~(modulo - 1), at = in - segment;
      return at + argument < modulo ? (int)(lane + argument)
                                    : (int)(kLanes + base + segment + ((at + argument) & (modulo - 1)));
    }
  }
  return -2;
}

static void shuffle(Simdgroup *s, uint32_t active) {
  report->shuffles++;
  for (uint32_t m = active; m; m &= m - 1) {
    uint32_t lane = (uint32_t)__builtin_ctz(m);
    int from = source_lane(s->kind[lane], lane, s->argument[lane], s->modulo[lane], active);
    const char *value = s->operand[lane];
    if (MG_LIKELY(from >= 0)) {
      uint32_t source = (uint32_t)from & (kLanes - 1);
      if (MG_UNLIKELY(!((active >> source) & 1))) finding_inactive_lane(&s->lanes[lane], (int)source);
      value = s->operand[source] + ((uint32_t)from >= kLanes ? 32 : 0);
    } else if (from == -2) {
      finding_inactive_lane(&s->lanes[lane], (int)s->argument[lane]);
    }
    __builtin_memcpy(s->result[lane], value, 32);
  }
}

extern "C" MG_WAITS void mg_arrive_shuffle(const void *data, uint32_t bytes, uint32_t kind,
                                           uint32_t argument, uint32_t modulo) {
  Lane *me = current;
  Simdgroup *s = me->simdgroup;
  uint32_t i = me->lane;
  if (MG_LIKELY(bytes == 4)) {
    __builtin_memcpy(s->operand[i], data, 4);
  } else {
    memcpy(s->operand[i], data, bytes);
  }
  uint32_t basic = kind & 15;
  if (basic == kFillUp || basic == kFillDown)
    memcpy(s->operand[i] + 32, (const char *)data + bytes, bytes);
  s->kind[i] = kind;
  s->argument[i] = argument;
  s->modulo[i] = modulo;
  collective(shuffle);
}
MG_STUB(shuffle);

enum Reduce : uint32_t {
  kSum, kProduct, kMinimum, kMaximum, kAnd, kOr, kXor, kExclusiveSum, kExclusiveProduct,
  kInclusiveSum, kInclusiveProduct
};

static inline float bitwise(uint32_t, float a, float) { return a; }
template <typename T>
static inline T bitwise(uint32_t operation, T a, T b) {
  return operation == kAnd ? (a & b) : operation == kOr ? (a | b) : (a ^ b);
}
static inline float add(float a, float b) { return a + b; }
static inline float multiply(float a, float b) { return a * b; }
static inline int64_t add(int64_t a, int64_t b) { return (int64_t)((uint64_t)a + (uint64_t)b); }
static inline int64_t multiply(int64_t a, int64_t b) { return (int64_t)((uint64_t)a * (uint64_t)b); }
static inline uint64_t add(uint64_t a, uint64_t b) { return a + b; }
static inline uint64_t multiply(uint64_t a, uint64_t b) { return a * b; }

template <typename T>
static inline T combine(uint32_t operation, T a, T b) {
  switch (operation) {
    case kSum: case kExclusiveSum: case kInclusiveSum: return add(a, b);
    case kProduct: case kExclusiveProduct: case kInclusiveProduct: return multiply(a, b);
    case kMinimum: return b < a || a != a ? b : a;
    case kMaximum: return a < b || a != a ? b : a;
    default: return bitwise(operation, a, b);
  }
}

template <typename T>
static void reduce_lanes(Simdgroup *s, uint32_t lanes) {
  if (!lanes) return;
  uint32_t operation = s->kind[__builtin_ctz(lanes)] & 15;
  bool exclusive = operation == kExclusiveSum || operation == kExclusiveProduct;
  bool scan = operation >= kExclusiveSum;
  T total = {};
  bool any = false;
  for (uint32_t m = lanes; m; m &= m - 1) {
    uint32_t i = (uint32_t)__builtin_ctz(m);
    T value;
    __builtin_memcpy(&value, s->operand[i], sizeof(T));
    if (exclusive) {
      T before = any ? total : operation == kExclusiveProduct ? (T)1 : (T)0;
      __builtin_memcpy(s->result[i], &before, sizeof(T));
    }
    total = any ? combine(operation, total, value) : value;
    any = true;
    if (scan && !exclusive) __builtin_memcpy(s->result[i], &total, sizeof(T));
  }
  if (scan) return;
  for (uint32_t m = lanes; m; m &= m - 1)
    __builtin_memcpy(s->result[__builtin_ctz(m)], &total, sizeof(T));
}

template <typename T>
static void reduce(Simdgroup *s, uint32_t active) {
  report->reductions++;
  if (s->kind[__builtin_ctz(active)] & kQuad) {
    for (uint32_t base = 0; base < kLanes; base += 4) reduce_lanes<T>(s, active & (15u << base));
  } else {
    reduce_lanes<T>(s, active);
  }
}

template <typename T>
static MG_ALWAYS_INLINE void reduce_wait(T value, uint32_t operation) {
  Lane *me = current;
  Simdgroup *s = me->simdgroup;
  __builtin_memcpy(s->operand[me->lane], &value, sizeof(T));
  s->kind[me->lane] = operation;
  collective(reduce<T>);
}
extern "C" {
MG_WAITS void mg_arrive_reduce_float(float v, uint32_t operation) { reduce_wait(v, operation); }
MG_WAITS void mg_arrive_reduce_int(int64_t v, uint32_t operation) { reduce_wait(v, operation); }
MG_WAITS void mg_arrive_reduce_uint(uint64_t v, uint32_t operation) { reduce_wait(v, operation); }
}
MG_STUB(reduce_float);
MG_STUB(reduce_int);
MG_STUB(reduce_uint);

static void ballot(Simdgroup *s, uint32_t active) {
  report->ballots++;
  uint64_t votes = 0;
  for (uint32_t m = active; m; m &= m - 1) {
    uint32_t i = (uint32_t)__builtin_ctz(m);
    if (s->argument[i]) votes |= 1ull << i;
  }
  for (uint32_t m = active; m; m &= m - 1) {
    uint32_t i = (uint32_t)__builtin_ctz(m);
    uint64_t mine = s->kind[i] ? (votes >> (i & ~3u)) & 15 : votes;
    __builtin_memcpy(s->result[i], &mine, 8);
  }
}
extern "C" MG_WAITS void mg_arrive_ballot(uint32_t predicate, uint32_t quad) {
  Lane *me = current;
  Simdgroup *s = me->simdgroup;
  s->argument[me->lane] = predicate;
  s->kind[me->lane] = quad;
  collective(ballot);
}
MG_STUB(ballot);

typedef float Row __attribute__((vector_size(32)));
static void multiply_accumulate(Simdgroup *s, uint32_t active) {
  uint32_t count = s->argument[__builtin_ctz(active)];
  report->multiply_accumulates += count;
  for (uint32_t n = 0; n < count; ++n) {
    if (MG_UNLIKELY(active != s->all)) finding_divergent_collective(s, active);
    Product &p = s->products[n];
    Row b[8];
    for (int k = 0; k < 8; ++k) b[k] = *(const Row *)p.b[k];
    for (int i = 0; i < 8; ++i) {
      Row sum = *(const Row *)p.c[i];
      for (int k = 0; k < 8; ++k) sum += p.a[i][k] * b[k];
      *(Row *)p.c[i] = sum;
    }
  }
}
// The lane has put its elements of `count` products into their slots.
extern "C" MG_WAITS void mg_arrive_multiply_accumulate_batch(uint32_t count) {
  current->simdgroup->argument[current->lane] = count;
  collective(multiply_accumulate);
}
MG_STUB(multiply_accumulate_batch);

// Loads and stores of matrices are accesses of the lanes; only that all lanes take part is checked.
static void matrix_access(Simdgroup *s, uint32_t active) {
  if (MG_UNLIKELY(active != s->all)) finding_divergent_collective(s, active);
}
extern "C" MG_WAITS void mg_arrive_access_simdgroup_matrix() { collective(matrix_access); }
MG_STUB(access_simdgroup_matrix);

static void simdgroup_barrier(Simdgroup *s, uint32_t active) {
  report->simdgroup_barriers++;
  if (MG_UNLIKELY(active != s->all)) finding_divergent_collective(s, active);
  uint32_t flags = ~0u;
  for (uint32_t m = active; m; m &= m - 1) flags &= s->argument[__builtin_ctz(m)];
  check_simdgroup_barrier(s, flags);
}
extern "C" MG_WAITS void mg_arrive_simdgroup_barrier(uint32_t flags) {
  current->simdgroup->argument[current->lane] = flags;
  collective(simdgroup_barrier);
}
MG_STUB(simdgroup_barrier);

// Where lanes that parted meet again (compiler/reconverge.py): after all other waits, the innermost
// meeting point first.
static void converge(Simdgroup *, uint32_t) {}
extern "C" MG_WAITS void mg_arrive_converge(uint32_t order) {
  mg_site = kMeetingPoint + order;
  collective(converge);
}
MG_STUB(converge);
