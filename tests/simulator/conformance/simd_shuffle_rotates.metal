// simd_shuffle_rotate_down wraps around the simdgroup
uint i = thread_position_in_grid.x;
uint lane = thread_index_in_simdgroup;
out[i] = simd_shuffle_rotate_down(a[i], ushort(5)) - simd_shuffle_rotate_up(a[i], ushort(1));
