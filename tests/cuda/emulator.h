// A CUDA block on this CPU: just enough of the language for the sources that metalgen renders.
//
// One fibre a thread; what a warp does together (shuffles, ldmatrix, mma) and barriers wait for the
// others. Copies in the background arrive as late as they may: when the thread that asked for them
// waits; until then their place holds 0xFF bytes, which are NaN in every type. So a missing wait or
// barrier shows in the result. Copies and reads by __ldg from outside of the inputs, and addresses
// that the hardware would refuse there, are reported; an index into a plain pointer is not looked at.
// x86-64 only: see em_switch.
#pragma once
#define __device__
#define __forceinline__ inline
#define __ldg em_read

using uint8_t = __UINT8_TYPE__;
using uint32_t = __UINT32_TYPE__;
using uint64_t = __UINT64_TYPE__;
using int64_t = __INT64_TYPE__;
using uintptr_t = __UINTPTR_TYPE__;

extern "C" {
void *malloc(__SIZE_TYPE__);
void *memcpy(void *, const void *, __SIZE_TYPE__);
void *memset(void *, int, __SIZE_TYPE__);
int memcmp(const void *, const void *, __SIZE_TYPE__);
float fmodf(float, float), erff(float), atan2f(float, float), powf(float, float), fabsf(float);
void sincosf(float, float *, float *);
}

#define EM_FUNCTION(name)             \
  extern "C" float name##f(float);    \
  inline float name(float x) { return name##f(x); }
EM_FUNCTION(asin) EM_FUNCTION(acos) EM_FUNCTION(atan) EM_FUNCTION(asinh) EM_FUNCTION(acosh) EM_FUNCTION(atanh)
EM_FUNCTION(rint) EM_FUNCTION(exp) EM_FUNCTION(exp2) EM_FUNCTION(log) EM_FUNCTION(log2) EM_FUNCTION(log10)
EM_FUNCTION(sin) EM_FUNCTION(cos) EM_FUNCTION(tan) EM_FUNCTION(sinh) EM_FUNCTION(cosh) EM_FUNCTION(tanh)
EM_FUNCTION(floor) EM_FUNCTION(ceil) EM_FUNCTION(sqrt)
inline float fabs(float x) { return fabsf(x); }
inline float atan2(float x, float y) { return atan2f(x, y); }
inline float pow(float x, float y) { return powf(x, y); }
inline float rsqrt(float x) { return 1.0f / sqrtf(x); }
inline int abs(int x) { return x < 0 ? -x : x; }

// Threads ------------------------------------------------------------------------------------------

struct Dim {
  unsigned x, y, z;
};
static Dim threadIdx, blockIdx, blockDim, gridDim;
alignas(1024) static unsigned char memory[1 << 18];
static unsigned shared_bytes;

struct Copy {
  void *to;
  const void *from;
  int bytes, there;
};

struct Fibre {
  void *stack_pointer;
  char *stack;
  bool done;
  int collectives;  // that it took part in: they take turns with two sets of slots
  Copy copies[8192];  // on their way
  int asked;          // how many
  int groups[16];     // how many of them were asked for when each group ended
  int group_count;
};

struct Warp {
  int waiting, turn;
  unsigned long long slots[2][32][6];
};

static Fibre fibres[1024];
static Warp warps[32];
static int threads, running, block_waiting, block_turn, direction;
static int idle;  // turns of waiting since somebody got on
static void *main_stack;
static const char *fault;
static unsigned random_state;
static const char *first_byte[64], *past_byte[64];
static int array_count;

static void em_report(const char *what) {
  if (!fault) fault = what;
}

extern "C" void em_switch(void **save, void *to);
__asm__(
    ".text\n.globl em_switch\nem_switch:\n\t"
    "pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
    "movq %rsp, (%rdi)\n\tmovq %rsi, %rsp\n\t"
    "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tret\n");

static void em_yield() {
  const int from = running;
  for (int n = 1; n <= threads; n++) {
    const int next = (from + direction * n + threads) % threads;
    if (fibres[next].done || next == from) continue;
    running = next;
    threadIdx = {unsigned(next), 0, 0};
    em_switch(&fibres[from].stack_pointer, fibres[next].stack_pointer);
    return;
  }
  if (!fibres[from].done) em_report("a barrier that not all threads reach");
  em_switch(&fibres[from].stack_pointer, main_stack);
}

// After a million turns of waiting nobody will come.
static void em_meet(int &waiting, int &turn, int count) {
  const int own = turn;
  idle = 0;
  if (++waiting == count) {
    waiting = 0;
    turn++;
    return;
  }
  for (int n = 0; turn == own; n++) {
    if (n == 1 << 20) {
      em_report("threads that wait for each other");
      em_switch(&fibres[running].stack_pointer, main_stack);
    }
    idle++;
    em_yield();
  }
  idle = 0;
}

inline void __syncthreads() {
  em_meet(block_waiting, block_turn, threads);
  random_state = random_state * 1103515245u + 12345u;
  direction = random_state >> 16 & 1 ? 1 : -1;
}

inline void __syncwarp() {
  Warp &warp = warps[running / 32];
  fibres[running].collectives++;
  em_meet(warp.waiting, warp.turn, 32);
}

// What the lanes of a warp show each other: each fills its own slot, and after the barrier reads.
inline unsigned long long (*em_slots())[6] {
  return warps[running / 32].slots[fibres[running].collectives & 1];
}

// Memory -------------------------------------------------------------------------------------------

static void em_inside(const void *from, int bytes) {
  const char *const at = static_cast<const char *>(from);
  for (int n = 0; n < array_count; n++) {
    if (at >= first_byte[n] && at + bytes <= past_byte[n]) return;
  }
  em_report("a read outside of all inputs");
}

template <typename A> A em_read(const A *from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(A)) em_report("a misaligned read");
  em_inside(from, sizeof(A));
  return *from;
}

// Threads take turns only where they wait.
inline float atomicAdd(float *to, float x) {
  const float before = *to;
  *to = before + x;
  return before;
}

inline void mg_add_4(float *to, float x, float y, float z, float w) {
  if (reinterpret_cast<uintptr_t>(to) % 16) em_report("a misaligned sum");
  const float all[4] = {x, y, z, w};
  for (int n = 0; n < 4; n++) to[n] += all[n];
}

template <int BYTES> void em_copy(void *to, const void *from, int there) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % BYTES) em_report("a misaligned copy");
  if (there) em_inside(from, there);
  const unsigned char *const own = static_cast<unsigned char *>(to);
  if (own < memory || own + BYTES > memory + shared_bytes) {
    em_report("a copy to outside of shared memory");
    return;
  }
  Fibre &fibre = fibres[running];
  if (fibre.asked == 8192) fibre.asked = 0, em_report("more copies at once than are kept");
  memset(to, 0xFF, BYTES);
  fibre.copies[fibre.asked++] = {to, from, BYTES, there};
}

inline unsigned mg_shared(const void *p) { return unsigned(static_cast<const unsigned char *>(p) - memory); }
inline void mg_copy_16(void *to, const void *from) { em_copy<16>(to, from, 16); }
inline void mg_copy_16(void *to, const void *from, bool there) { em_copy<16>(to, from, there ? 16 : 0); }
template <int BYTES> void mg_copy_small(void *to, const void *from, bool there) { em_copy<BYTES>(to, from, there ? BYTES : 0); }

inline void mg_commit() {
  Fibre &fibre = fibres[running];
  if (fibre.group_count == 16) fibre.group_count = 0, em_report("more groups of copies than are kept");
  fibre.groups[fibre.group_count++] = fibre.asked;
}

static void em_land(const Copy &copy) {
  memcpy(copy.to, copy.from, copy.there);
  memset(static_cast<char *>(copy.to) + copy.there, 0, copy.bytes - copy.there);
}

template <int N> void mg_wait() {
  Fibre &fibre = fibres[running];
  if (fibre.group_count <= N) return;
  const int ended = fibre.group_count - N, last = fibre.groups[ended - 1];
  for (int n = 0; n < last; n++) em_land(fibre.copies[n]);
  for (int n = last; n < fibre.asked; n++) fibre.copies[n - last] = fibre.copies[n];
  fibre.asked -= last;
  for (int n = ended; n < fibre.group_count; n++) fibre.groups[n - ended] = fibre.groups[n] - last;
  fibre.group_count = N;
}

// Numbers ------------------------------------------------------------------------------------------

template <typename A, typename B> A em_bits(B x) {
  static_assert(sizeof(A) == sizeof(B));
  return __builtin_bit_cast(A, x);
}
inline float __uint_as_float(unsigned x) { return em_bits<float>(x); }
inline float __int_as_float(int x) { return em_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return em_bits<unsigned>(x); }

// The 16-bit float with these bits of exponent, of fraction: to the nearest, ties to even.
template <int EXPONENT, int FRACTION> unsigned short em_round(double x) {
  const unsigned long long bits = em_bits<unsigned long long>(x);
  const unsigned sign = unsigned(bits >> 63) << 15, infinity = ((1u << EXPONENT) - 1) << FRACTION;
  const int least = 2 - (1 << (EXPONENT - 1));  // exponent of the smallest normal number
  if (x != x) return sign | infinity | 1 << (FRACTION - 1);
  const double size = x < 0 ? -x : x;
  if (size == 0) return sign;
  int exponent = int(bits >> 52 & 2047) - 1023;
  if (exponent > -least + 1) return sign | infinity;
  if (exponent < least) exponent = least;
  const double scaled = size * em_bits<double>((unsigned long long)(1023 + FRACTION - exponent) << 52);
  unsigned whole = unsigned(scaled);
  const double rest = scaled - whole;
  whole += rest > 0.5 || (rest == 0.5 && whole & 1);
  const unsigned found = whole + (unsigned(exponent - least) << FRACTION);
  return sign | (found > infinity ? infinity : found);
}

template <int EXPONENT, int FRACTION> float em_value(unsigned short x) {
  const int exponent = x >> FRACTION & ((1 << EXPONENT) - 1), fraction = x & ((1 << FRACTION) - 1);
  const int least = 2 - (1 << (EXPONENT - 1));
  if (exponent == (1 << EXPONENT) - 1) return __uint_as_float((x >> 15 << 31) | 0x7F800000u | unsigned(fraction) << (23 - FRACTION));
  const double unit = em_bits<double>((unsigned long long)(1023 + least - FRACTION + (exponent ? exponent - 1 : 0)) << 52);
  const double size = (exponent ? fraction + (1 << FRACTION) : fraction) * unit;
  return float(x >> 15 ? -size : size);
}

template <int EXPONENT, int FRACTION> struct Small {
  unsigned short bits;
  Small() = default;
  explicit Small(double x) : bits(em_round<EXPONENT, FRACTION>(x)) {}
  operator float() const { return em_value<EXPONENT, FRACTION>(bits); }
};
using __half = Small<5, 10>;
using __nv_bfloat16 = Small<8, 7>;

template <typename A, typename B> auto min(A a, B b) { return a < b ? a : b; }
template <typename A, typename B> auto max(A a, B b) { return a > b ? a : b; }
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float fmaf(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float fmaxf(float a, float b) { return a > b || b != b ? a : b; }
inline float mg_exp2(float x) { return exp2f(x); }
inline float mg_reciprocal(float x) { return 1.0f / x; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((unsigned long long)a * b >> 32); }

inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const unsigned long long both = (unsigned long long)b << 32 | a;
  unsigned found = 0;
  for (int n = 0; n < 4; n++) found |= unsigned(both >> (selector >> n * 4 & 7) * 8 & 255) << n * 8;
  return found;
}

struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
template <typename A> unsigned mg_pack(float x, float y, A) { return A(x).bits | unsigned(A(y).bits) << 16; }

// Warps --------------------------------------------------------------------------------------------

template <typename A> A __shfl_sync(unsigned, A x, int from) {
  auto *const slots = em_slots();
  memcpy(slots[running % 32], &x, sizeof(A));
  __syncwarp();
  memcpy(&x, slots[from & 31], sizeof(A));
  return x;
}
template <typename A> A __shfl_xor_sync(unsigned mask, A x, int bits) { return __shfl_sync(mask, x, running % 32 ^ bits); }

inline unsigned __ballot_sync(unsigned, bool x) {
  auto *const slots = em_slots();
  slots[running % 32][0] = x;
  __syncwarp();
  unsigned found = 0;
  for (int n = 0; n < 32; n++) found |= unsigned(slots[n][0]) << n;
  return found;
}

template <bool TRANSPOSED> void em_matrices(unsigned (&x)[4], const void *row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) em_report("a misaligned row of a matrix");
  auto *const slots = em_slots();
  const int lane = running % 32;
  slots[lane][0] = reinterpret_cast<uintptr_t>(row);
  __syncwarp();
  for (int n = 0; n < 4; n++) {
    x[n] = 0;
    for (int e = 0; e < 2; e++) {
      const int line = TRANSPOSED ? lane % 4 * 2 + e : lane / 4, column = TRANSPOSED ? lane / 4 : lane % 4 * 2 + e;
      x[n] |= unsigned(reinterpret_cast<const unsigned short *>(slots[n * 8 + line][0])[column]) << e * 16;
    }
  }
  __syncwarp();  // nobody overwrites the rows before all have read
}
inline void mg_matrices(unsigned (&x)[4], const void *row) { em_matrices<false>(x, row); }
inline void mg_matrices(unsigned (&x)[4], unsigned row) { em_matrices<false>(x, memory + row); }
inline void mg_matrices_transposed(unsigned (&x)[4], const void *row) { em_matrices<true>(x, row); }
inline void mg_matrices_transposed(unsigned (&x)[4], unsigned row) { em_matrices<true>(x, memory + row); }

// c (16x8) = a (16xK) b (Kx8) + c, by the layouts of mma.sync: a register holds PACK numbers.
template <int K, int PACK, typename Number> void em_multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, bool add, Number number) {
  auto *const slots = em_slots();
  const int lane = running % 32;
  for (int n = 0; n < 4; n++) slots[lane][n] = a[n];
  slots[lane][4] = b0, slots[lane][5] = b1;
  __syncwarp();
  for (int n = 0; n < 4; n++) {
    const int row = lane / 4 + n / 2 * 8, column = lane % 4 * 2 + n % 2;
    double sum = add ? c[n] : 0.0f;
    for (int k = 0; k < K; k++) {
      const int other = k % (K / 2) / PACK, upper = k / (K / 2), part = k % PACK;
      sum += number(unsigned(slots[row % 8 * 4 + other][upper * 2 + row / 8]), part) * number(unsigned(slots[column * 4 + other][4 + upper]), part);
    }
    c[n] = float(sum);
  }
}
template <typename A> void mg_multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1, bool add, A) {
  em_multiply<16, 2>(c, a, b0, b1, add, [](unsigned x, int part) { A y; y.bits = x >> part * 16; return double(float(y)); });
}
inline void mg_multiply_tf32(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
  em_multiply<8, 1>(c, a, b[0], b[1], true, [](unsigned x, int) { return double(__uint_as_float(x)); });
}

inline void mg_split(unsigned &high, unsigned &low, float x) {
  const auto rounded = [](float y) {
    const unsigned bits = em_bits<unsigned>(y);
    return (bits & 0x7F800000u) == 0x7F800000u ? bits : (bits + 0x1000u) & 0xFFFFE000u;
  };
  high = rounded(x);
  low = rounded(x - __uint_as_float(high));
}

#ifdef EM_T  // of the elements that quantized rows become
inline unsigned mg_fma_2(unsigned a, unsigned b, unsigned c) {
  unsigned found = 0;
  for (int n = 0; n < 32; n += 16) {
    EM_T x[3];
    x[0].bits = a >> n, x[1].bits = b >> n, x[2].bits = c >> n;
    found |= unsigned(EM_T(double(float(x[0])) * float(x[1]) + float(x[2])).bits) << n;
  }
  return found;
}
#ifdef EM_HALF
inline unsigned mg_bits_of(unsigned x, unsigned mask) { return (x & mask) | 0x64006400u; }
#endif
#endif

#ifdef EM_WARP_GROUPS
#include "warp_groups.h"
#else
static void em_begin_block() {}
static void em_end_block() {}
#endif

// A launch -----------------------------------------------------------------------------------------

struct Shape {
  int of[8];
  int operator[](int n) const { return of[n]; }
};
struct Strides {
  int64_t of[8];
  int64_t operator[](int n) const { return of[n]; }
};
static void **pointers;
static const Shape *shapes;
static const Strides *strides;
static void em_kernel();

static void em_start() {
  em_kernel();
  fibres[running].done = true;
  em_yield();
}

// Runs a kernel; what is wrong with it, or null.
extern "C" const char *em_launch(const unsigned *grid, int block, unsigned bytes, void **all, const Shape *all_shapes, const Strides *all_strides, const char **first, const char **past, int inputs, unsigned seed) {
  constexpr int STACK = 1 << 18;
  threads = block, shared_bytes = bytes, pointers = all, shapes = all_shapes, strides = all_strides;
  array_count = inputs, random_state = seed, direction = 1, fault = nullptr;
  for (int n = 0; n < inputs; n++) first_byte[n] = first[n], past_byte[n] = past[n];
  gridDim = {grid[0], grid[1], grid[2]}, blockDim = {unsigned(block), 1, 1};
  for (blockIdx.z = 0; blockIdx.z < grid[2]; blockIdx.z++) {
    for (blockIdx.y = 0; blockIdx.y < grid[1]; blockIdx.y++) {
      for (blockIdx.x = 0; blockIdx.x < grid[0]; blockIdx.x++) {
        memset(memory, 0xFF, sizeof(memory));
        block_waiting = idle = 0;
        em_begin_block();
        for (int n = 0; n < block; n++) {
          Fibre &fibre = fibres[n];
          if (!fibre.stack) fibre.stack = static_cast<char *>(malloc(STACK));
          void **top = reinterpret_cast<void **>((reinterpret_cast<uintptr_t>(fibre.stack) + STACK - 64) & ~uintptr_t(15));
          *--top = nullptr;
          *--top = reinterpret_cast<void *>(em_start);
          for (int r = 0; r < 6; r++) *--top = nullptr;
          fibre.stack_pointer = top;
          fibre.done = false;
          fibre.collectives = fibre.asked = fibre.group_count = 0;
          warps[n / 32].waiting = 0;
        }
        running = 0;
        threadIdx = {0, 0, 0};
        em_switch(&main_stack, fibres[0].stack_pointer);
        em_end_block();
        for (unsigned n = bytes; n < sizeof(memory); n++) {
          if (memory[n] != 0xFF) em_report("a store to outside of shared memory");
        }
        if (fault) return fault;
      }
    }
  }
  return nullptr;
}
