// What the precompiled header holds: every Metal header, and how a kernel is called.
#pragma once
#include "metal_stdlib"
#include "metal_simdgroup_matrix"
#include "metal_logging"
#include "mg_entry.h"
