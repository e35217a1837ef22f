// How the runtime calls a kernel: one mg_thread a thread, turned into the kernel's own parameters.
#pragma once
#include "metal_types"
#ifndef MG_MACROS_ONLY

// The same layout as mg_thread in runtime/abi.h.
struct mg_thread {
  uint thread_position_in_grid[3];
  uint thread_position_in_threadgroup[3];
  uint threadgroup_position_in_grid[3];
  uint threads_per_threadgroup[3];
  uint dispatch_threads_per_threadgroup[3];
  uint threads_per_grid[3];
  uint threadgroups_per_grid[3];
  uint grid_origin[3];
  uint thread_index_in_threadgroup[3];
  uint thread_index_in_simdgroup[3];
  uint simdgroup_index_in_threadgroup[3];
  uint simdgroups_per_threadgroup[3];
  uint dispatch_simdgroups_per_threadgroup[3];
  uint threads_per_simdgroup[3];
  uint thread_execution_width[3];
  uint quadgroup_index_in_threadgroup[3];
  uint thread_index_in_quadgroup[3];
  uint quadgroups_per_threadgroup[3];
  uint grid_size[3];
};

extern "C" ulong mg_buffer_address(uint index);
extern "C" ulong mg_threadgroup_argument(uint index);

namespace mg {

template <typename F>
struct signature;
template <typename R, typename... P>
struct signature<R(P...)> {
  template <int I>
  using parameter = __type_pack_element<I, P...>;
};

template <typename R, typename... P>
struct signature<R (&)(P...)> : signature<R(P...)> {};

// A buffer parameter: a pointer or a reference into device or constant memory.
template <typename P>
struct buffer;
#define MG_BUFFER(space)                                                              \
  template <typename T>                                                               \
  struct buffer<space T*> {                                                           \
    METAL_INTERNAL static space T* get(uint i) { return (space T*)mg_buffer_address(i); } \
  };                                                                                  \
  template <typename T>                                                               \
  struct buffer<space T&> {                                                           \
    METAL_INTERNAL static space T& get(uint i) { return *(space T*)mg_buffer_address(i); } \
  };
MG_BUFFER(__global)
MG_BUFFER(__constant)
#undef MG_BUFFER
template <typename P>
struct threadgroup_buffer;
template <typename T>
struct threadgroup_buffer<__local T*> {
  METAL_INTERNAL static __local T* get(uint i) { return (__local T*)mg_threadgroup_argument(i); }
};

// A position parameter: one value, or the first two or three of them as a vector.
template <typename P>
METAL_INTERNAL P position(const __private uint* v) {
  if constexpr (shape<P>::vector) {
    P out{};
    for (int i = 0; i < shape<P>::count; ++i) out[i] = (typename shape<P>::element)v[i];
    return out;
  } else {
    return (P)v[0];
  }
}

}  // namespace mg
#endif
