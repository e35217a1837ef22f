// What a thread writes to threadgroup memory its threadgroup reads after a barrier
uint i = thread_position_in_grid.x;
threadgroup float shared[64];
uint t = thread_position_in_threadgroup.x;
shared[t] = a[i];
threadgroup_barrier(mem_flags::mem_threadgroup);
out[i] = shared[63 - t] + threadgroup_position_in_grid.x * 1000.0f;
