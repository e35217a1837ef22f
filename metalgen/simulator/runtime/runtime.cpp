// The runtime, one translation unit: MG_CHECKED chooses the checked or the plain build.
#include "softfloat.cpp"
#include "memory.cpp"
#include "scheduler.cpp"
#include "collectives.cpp"
#if MG_CHECKED
#include "checker.cpp"
#include "counters.cpp"
#else
#include "unchecked.cpp"
#endif
