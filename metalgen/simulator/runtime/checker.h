// The checker: findings, shadow memory, counters. The plain build has only the findings' stubs.
#pragma once
#include "memory.h"

#ifndef MG_CHECKED
#define MG_CHECKED 0
#endif
static const bool kChecked = MG_CHECKED;

uintptr_t image_base();
bool check_begin();
void check_end();
// The lanes of a mask have met (or are done): what they accessed is counted together.
void count_lanes(Simdgroup *simdgroup, uint32_t lanes);
void check_variable(const Variable *variable);
void check_simdgroup_barrier(Simdgroup *simdgroup, uint32_t flags);
void finding_divergent_barrier(Lane *lane, uintptr_t other_site, uint32_t came);
void finding_divergent_collective(Simdgroup *simdgroup, uint32_t active);
void finding_inactive_lane(Lane *lane, int source);
