// A reduction takes the active lanes
uint i = thread_position_in_grid.x;
uint lane = thread_index_in_simdgroup;
float s = 0.0f;
if (lane < 7) s = simd_sum(a[i]);
out[i] = s + simd_max(a[i]);
