// The plain build: no checks, no counts but those that cost nothing.
#include "checker.h"
bool check_begin() { return true; }
void check_end() {}
void check_threadgroup_begin() {}
void check_threadgroup_end() {}
void check_barrier(uint32_t, bool, uint32_t) {}
void count_lanes(Simdgroup *, uint32_t) {}
void check_variable(const Variable *) {}
void check_simdgroup_barrier(Simdgroup *, uint32_t) {}
void finding_divergent_barrier(Lane *, uintptr_t, uint32_t) {}
void finding_divergent_collective(Simdgroup *, uint32_t) {}
void finding_inactive_lane(Lane *, int) {}
