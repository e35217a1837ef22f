// What kernels of warp groups use, on this CPU (see emulator.h, which includes this): barriers in shared
// memory, and products that read tiles by descriptors and are waited for.
//
// Everything happens as late as it may. Copies land when a thread waits for their barrier and nobody
// else can get on. A product is computed when it is waited for, from registers and tiles as they are
// then; until then its accumulator is NaN. Reported: a tile read before a proxy fence, panels that are
// not aligned, products begun without a fence or never waited for, accumulators touched meanwhile, and
// warps of a group that do not agree.
#pragma once

static int em_clock;  // counts landings, waits and fences

// Barriers -----------------------------------------------------------------------------------------

struct Barrier {
  const void *at;
  int count, missing, parity;  // the parity of the phase that is going on
  int ended;                   // when the last phase did
};

// Arrivals of a thread that follow its copies, in order.
struct Arrival {
  Barrier *barrier;
  int copies;  // that it asked for since the arrival before
};

static Barrier barriers[64];
static int barrier_count;
static Arrival arrivals[1024][64];
static int arrival_count[1024];
static int landed_at[sizeof(memory) / 16];  // when the copy of a chunk landed
static unsigned char known[sizeof(memory)];   // what copies and products have seen there
static int fenced_at[1024], waited_for[1024];  // when a thread's last fence was, and the end of what it has waited for

static Barrier &em_barrier(const void *at) {
  for (int n = 0; n < barrier_count; n++) {
    if (barriers[n].at == at) return barriers[n];
  }
  em_report("a barrier that nobody has initialized");
  return barriers[0];
}

static void em_arrive(Barrier &barrier) {
  idle = 0;
  if (--barrier.missing > 0) return;
  barrier.missing = barrier.count;
  barrier.parity ^= 1;
  barrier.ended = ++em_clock;
}

inline void mg_barrier_init(unsigned long long *at, int count) {
  const unsigned char *const place = reinterpret_cast<unsigned char *>(at);
  if (place < memory || place + 8 > memory + shared_bytes || reinterpret_cast<uintptr_t>(at) % 8) em_report("a barrier outside of shared memory");
  barriers[barrier_count++] = {at, count, count, 0, 0};
}

inline void mg_barrier_arrive(unsigned long long *at) { em_arrive(em_barrier(at)); }

inline void mg_barrier_arrive_behind_copies(unsigned long long *at) {
  int before = 0;
  for (int n = 0; n < arrival_count[running]; n++) before += arrivals[running][n].copies;
  if (arrival_count[running] == 64) arrival_count[running] = 0, em_report("more arrivals than are kept");
  arrivals[running][arrival_count[running]++] = {&em_barrier(at), fibres[running].asked - before};
}

// The first arrivals of a thread, up to the last one at a barrier.
static bool em_land_arrivals(int thread, const Barrier *barrier) {
  int last = -1;
  for (int n = 0; n < arrival_count[thread]; n++) {
    if (!barrier || arrivals[thread][n].barrier == barrier) last = n;
  }
  if (last < 0) return false;
  Fibre &fibre = fibres[thread];
  int copies = 0;
  for (int n = 0; n <= last; n++) copies += arrivals[thread][n].copies;
  em_clock++;
  for (int n = 0; n < copies; n++) {
    const Copy &copy = fibre.copies[n];
    em_land(copy);
    const long at = static_cast<unsigned char *>(copy.to) - memory;
    landed_at[at / 16] = em_clock;
    memcpy(known + at, memory + at, 16);
  }
  for (int n = copies; n < fibre.asked; n++) fibre.copies[n - copies] = fibre.copies[n];
  fibre.asked -= copies;
  for (int n = 0; n <= last; n++) em_arrive(*arrivals[thread][n].barrier);
  for (int n = last + 1; n < arrival_count[thread]; n++) arrivals[thread][n - last - 1] = arrivals[thread][n];
  arrival_count[thread] -= last + 1;
  return true;
}

inline void mg_barrier_wait(unsigned long long *at, unsigned parity) {
  Barrier &barrier = em_barrier(at);
  for (int n = 0; barrier.parity == int(parity & 1); n++) {
    if (idle > 2 * threads) {  // nobody gets on by himself
      bool landed = false;
      for (int thread = 0; thread < threads; thread++) landed |= em_land_arrivals(thread, &barrier);
      if (landed) continue;
    }
    if (n == 1 << 20 || idle > 1 << 20) {
      em_report("threads that wait for each other");
      em_switch(&fibres[running].stack_pointer, main_stack);
    }
    idle++;
    em_yield();
  }
  idle = 0;
  waited_for[running] = barrier.ended;
}

// Late, too: when all others wait, or have ended.
inline void mg_copies_wait() {
  const auto others = [] {
    for (int n = 0; n < threads; n++) {
      if (n != running && !fibres[n].done) return true;
    }
    return false;
  };
  while (idle <= 2 * threads && others()) {
    idle++;
    em_yield();
  }
  em_land_arrivals(running, nullptr);
}
inline void mg_proxy_fence() { fenced_at[running] = ++em_clock; }
inline void mg_stored() { mg_proxy_fence(); }
template <int N> void mg_registers_down() {}
template <int N> void mg_registers_up() {}

// Products -----------------------------------------------------------------------------------------

struct Product {
  float *into;
  int width;  // columns of the accumulator
  unsigned long long a, b;
  bool by_registers, add;
  const unsigned *left[4];
  unsigned left_values[4];
  int batch;
};

// What the first warp of a group asked for, to be compared.
struct Asked {
  unsigned long long a, b;
  int width, add;
};

static Product products[1024][64];
static int product_count[1024], batch_of[1024], begun[1024];
static long number_of[1024];                // products of a thread so far
static float saved[1024][2][128];           // accumulators on their way
static float *saved_of[1024][2];
static Asked asked[8][256];                 // of a warp group, by number
static long asked_count[8];
constexpr float EM_POISON = __builtin_nanf("0x2A51");

static void em_begin_block() {
  em_clock = barrier_count = 0;
  memset(arrival_count, 0, sizeof(arrival_count));
  memset(landed_at, 0, sizeof(landed_at));
  memset(known, 0xFF, sizeof(known));
  memset(fenced_at, 0, sizeof(fenced_at)), memset(waited_for, 0, sizeof(waited_for));
  memset(product_count, 0, sizeof(product_count)), memset(batch_of, 0, sizeof(batch_of)), memset(begun, 0, sizeof(begun));
  memset(number_of, 0, sizeof(number_of)), memset(saved_of, 0, sizeof(saved_of)), memset(asked_count, 0, sizeof(asked_count));
}

static void em_end_block() {
  for (int n = 0; n < threads; n++) {
    if (product_count[n]) em_report("a product that nobody has waited for");
    if (number_of[n] != number_of[n / 128 * 128]) em_report("warps of a group that do not agree");
    if (arrival_count[n]) em_report("copies that are on their way when the block ends");
  }
}

template <int N> void mg_products_begin(float (&)[N]) { begun[running] = 1; }
template <int N> void mg_products_begin(unsigned (&)[N]) { begun[running] = 1; }
template <int N> void mg_products_end(float (&)[N]) {}
template <int N> void mg_products_end(unsigned (&)[N]) {}

// Accumulators that are on their way hold NaN, and are kept elsewhere.
static void em_ask(Product product) {
  const int thread = running, group = thread / 128;
  if (!begun[thread]) em_report("a product without a fence before it");
  const long number = number_of[thread]++;
  const Asked own = {product.a, product.b, product.width, product.add};
  if (number == asked_count[group]) asked[group][asked_count[group]++ % 256] = own;
  const Asked &first = asked[group][number % 256];
  if (number < asked_count[group] - 256 || first.a != own.a || first.b != own.b || first.width != own.width || first.add != own.add) em_report("warps of a group that do not agree");
  int place = 0;
  while (place < 2 && saved_of[thread][place] != product.into) place++;
  if (place == 2) {
    place = saved_of[thread][0] ? 1 : 0;
    if (saved_of[thread][place]) return em_report("three accumulators on their way");
    saved_of[thread][place] = product.into;
    for (int n = 0; n < product.width / 2; n++) saved[thread][place][n] = product.into[n], product.into[n] = EM_POISON;
  }
  product.batch = batch_of[thread];
  if (product_count[thread] == 64) return em_report("more products than are kept");
  products[thread][product_count[thread]++] = product;
}

static float em_numbers[1 << 16];
static bool em_numbers_known;
template <typename A> const float *em_table() {
  if (!em_numbers_known) {
    for (int n = 0; n < 1 << 16; n++) {
      A x;
      x.bits = n;
      em_numbers[n] = float(x);
    }
    em_numbers_known = true;
  }
  return em_numbers;
}

// The chunk of 16 bytes at an address that a descriptor names, which the swizzle permutes.
static const unsigned short *em_chunk(unsigned address) {
  address ^= (address >> 7 & 7) << 4;
  if (address + 16 > shared_bytes) {
    em_report("a product that reads outside of shared memory");
    return reinterpret_cast<const unsigned short *>(memory);
  }
  if (memcmp(known + address, memory + address, 16)) {  // stored, before what this thread has waited for
    memcpy(known + address, memory + address, 16);
    landed_at[address / 16] = waited_for[running];
  }
  if (landed_at[address / 16] > fenced_at[running]) em_report("a product that reads a tile without a proxy fence");
  return reinterpret_cast<const unsigned short *>(memory + address);
}

struct Panels {
  unsigned address, leading, stride;
  explicit Panels(unsigned long long x) : address(unsigned(x & 0x3FFF) << 4), leading(unsigned(x >> 16 & 0x3FFF) << 4), stride(unsigned(x >> 32 & 0x3FFF) << 4) {
    if (x >> 62 != 1 || address & 0x380 || stride != 1024) em_report("panels that are not aligned, or of another swizzle");
  }
};

template <typename A> void em_compute(const Product &p, float *into) {
  const float *const table = em_table<A>();
  const int lane = running % 32, warp = running / 32 % 4, quad = lane / 4, pair = lane % 4;
  float left[2][16];
  auto *const slots = em_slots();
  for (int n = 0; n < 4; n++) {
    if (p.by_registers && *p.left[n] != p.left_values[n]) em_report("registers that changed under a product");
    slots[lane][n] = p.by_registers ? *p.left[n] : 0;
  }
  __syncwarp();
  for (int row = 0; row < 2; row++) {
    for (int k = 0; k < 16; k++) {
      if (p.by_registers) {
        left[row][k] = table[unsigned(slots[quad * 4 + k % 8 / 2][k / 8 * 2 + row]) >> k % 2 * 16 & 0xFFFF];
      } else {
        const Panels a(p.a);
        const int line = warp * 16 + row * 8 + quad;
        left[row][k] = table[em_chunk(a.address + line / 8 * a.stride + line % 8 * 128 + k / 8 * 16)[k % 8]];
      }
    }
  }
  const Panels b(p.b);
  for (int f = 0; f < p.width / 8; f++) {
    for (int e = 0; e < 2; e++) {
      const int column = f * 8 + pair * 2 + e;
      float right[16];
      for (int k = 0; k < 16; k++) {
        if (p.by_registers) {  // rows of B are contracted
          right[k] = table[em_chunk(b.address + column / 64 * b.leading + k / 8 * b.stride + k % 8 * 128 + column % 64 / 8 * 16)[column % 8]];
        } else {
          right[k] = table[em_chunk(b.address + f * b.stride + column % 8 * 128 + k / 8 * 16)[k % 8]];
        }
      }
      for (int row = 0; row < 2; row++) {
        double sum = p.add ? into[f * 4 + row * 2 + e] : 0.0f;
        for (int k = 0; k < 16; k++) sum += double(left[row][k]) * right[k];
        into[f * 4 + row * 2 + e] = float(sum);
      }
    }
  }
  __syncwarp();
}

static void (*em_compute_any)(const Product &, float *);

template <int N, typename A> void mg_multiply_panels(float (&c)[N], unsigned long long a, unsigned long long b, int add, A) {
  em_compute_any = em_compute<A>;
  em_ask({c, N * 2, a, b, false, bool(add)});
}

template <int N, typename A> void mg_multiply_rows(float (&c)[N], const unsigned &a0, const unsigned &a1, const unsigned &a2, const unsigned &a3, unsigned long long b, A) {
  em_compute_any = em_compute<A>;
  em_ask({c, N * 2, 0, b, true, true, {&a0, &a1, &a2, &a3}, {a0, a1, a2, a3}});
}

inline void mg_products_commit() { batch_of[running]++; }

template <int N> void mg_products_wait() {
  const int thread = running;
  begun[thread] = 0;
  int done = 0;
  while (done < product_count[thread] && products[thread][done].batch < batch_of[thread] - N) done++;
  for (int n = 0; n < done; n++) {
    const Product &p = products[thread][n];
    const int place = saved_of[thread][1] == p.into;
    float *const values = saved[thread][place];
    em_compute_any(p, values);
    bool last = true;
    for (int m = n + 1; m < product_count[thread]; m++) last &= products[thread][m].into != p.into;
    if (!last) continue;
    for (int m = 0; m < p.width / 2; m++) {
      if (__float_as_uint(p.into[m]) != __float_as_uint(EM_POISON)) em_report("an accumulator that was touched under a product");
      p.into[m] = values[m];
    }
    saved_of[thread][place] = nullptr;
  }
  for (int n = done; n < product_count[thread]; n++) products[thread][n - done] = products[thread][n];
  product_count[thread] -= done;
}
