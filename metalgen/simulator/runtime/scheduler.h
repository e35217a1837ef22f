// The threads of one threadgroup, and what they wait for.
//
// Everything here is global: a process runs one threadgroup at a time, on one operating system
// thread. A simdgroup's lanes run one after another until each waits at a collective or a barrier or
// is done. When no lane can run, the lanes at the collective of the lowest code address (and only
// those) take part in it. The meeting points at the ends of branches and loops come after all
// collectives: lanes that left a loop early so wait for those still inside.
#pragma once
#include "abi.h"
#include "fibre.h"
#include "report.h"

enum { kLanes = 32, kMaxThreads = 4096, kSlotBytes = 64 };

struct Simdgroup;

// One matrix product, a * b + c, whose result takes the place of c. Its layout, and how many there are
// at once, are known to compiler/products.py.
struct alignas(64) Product {
  float a[8][8], b[8][8], c[8][8];
};
enum { kProducts = 8 };

// The first three members are known to compiler/include/metal_runtime.
struct Lane {
  Fibre fibre;
  char *result;    // of a shuffle, a reduction or a ballot
  float *product;  // this lane's two elements of `a` in the first slot for matrix products
  uint32_t lane, bit;
  Simdgroup *simdgroup;
  uint32_t element;  // of this lane's first element in an 8x8 matrix
  uintptr_t site;  // return address of the collective or barrier it waits at
  void *arrays;    // top of the stack that holds its arrays
  mg_thread identity;
};

// What a collective does once its lanes have come: reads their operands, writes their results.
typedef void (*Operation)(Simdgroup *simdgroup, uint32_t active);

struct Simdgroup {
  uint32_t all, live, runnable, at_collective, at_barrier;  // lane masks
  uint32_t index, mixed;                               // mixed: lanes wait at more than one site
  uintptr_t site;
  uint32_t argument[kLanes], modulo[kLanes], kind[kLanes];
  Operation operations[kLanes];
  Lane *lanes;
  alignas(64) char operand[kLanes][kSlotBytes];
  alignas(64) char result[kLanes][kSlotBytes];
  Product products[kProducts];
};

// The sites of mg_converge: above those of all code.
static const uintptr_t kMeetingPoint = (uintptr_t)1 << 63;

struct Threadgroup {
  uint32_t thread_count, simdgroup_count, live_simdgroups;
  uint32_t waiting_simdgroups;
  uint32_t position[3];
  uint64_t linear;
};

extern "C" Lane *mg_current __attribute__((visibility("hidden")));
#define current mg_current
extern Threadgroup group;
extern const mg_launch *launch;
extern mg_report *report;

// The current lane waits, at mg_site, until the lanes of this collective have come and operation has
// run; chooses who runs now.
void collective(Operation operation);

Simdgroup *simdgroup_at(uint32_t index);

// Checked mode (checker.cpp); the plain build has empty ones.
void check_threadgroup_begin();
void check_threadgroup_end();
void check_barrier(uint32_t flags, bool simdgroup_only, uint32_t lanes);
