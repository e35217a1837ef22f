// What the precompiled header holds: every Metal header, and how a kernel is called.
#pragma once
#include "metal_stdlib"
#include "metal_simdgroup_matrix"
#include "metal_logging"
#include "metal_uniform"
#include "mg_entry.h"

// Words that are reserved in C++ for OpenCL and free in Metal.
#define local mg_word_local
#define global mg_word_global
#define generic mg_word_generic
#define pipe mg_word_pipe
#define read_only mg_word_read_only
#define write_only mg_word_write_only
#define read_write mg_word_read_write
#define event_t mg_word_event_t
#define sampler_t mg_word_sampler_t
#define queue_t mg_word_queue_t
#define reserve_id_t mg_word_reserve_id_t
#define memory_scope mg_word_memory_scope
