// simd_shuffle_and_fill_up fills from the end of the filling values
uint i = thread_position_in_grid.x;
uint lane = thread_index_in_simdgroup;
out[i] = simd_shuffle_and_fill_up(a[i], b[i], ushort(2));
