// simd_shuffle_up keeps the value of lanes below the step, simd_shuffle_down of those above
uint i = thread_position_in_grid.x;
uint lane = thread_index_in_simdgroup;
out[2 * i] = simd_shuffle_up(a[i], ushort(3));
out[2 * i + 1] = simd_shuffle_down(a[i], ushort(3));
