// simd_prefix_exclusive_sum starts with zero, the inclusive one with the own value
uint i = thread_position_in_grid.x;
uint lane = thread_index_in_simdgroup;
out[2 * i] = simd_prefix_exclusive_sum(a[i]);
out[2 * i + 1] = simd_prefix_inclusive_sum(a[i]);
