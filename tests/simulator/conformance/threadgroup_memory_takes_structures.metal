// Structures of any alignment copy between device and threadgroup memory
uint i = thread_position_in_grid.x;
threadgroup float shared[256];
uint t = thread_position_in_threadgroup.x;
struct wide { float v[4]; };
*(threadgroup wide*)(shared + 4 * t) = *(const device wide*)(a + 4 * i);
threadgroup_barrier(mem_flags::mem_threadgroup);
*(device wide*)(out + 4 * i) = *(const threadgroup wide*)(shared + 4 * (63 - t));
