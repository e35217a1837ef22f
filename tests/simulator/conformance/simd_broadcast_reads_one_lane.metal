// simd_broadcast and simd_shuffle read one lane; simd_broadcast_first the lowest active
uint i = thread_position_in_grid.x;
uint lane = thread_index_in_simdgroup;
out[i] = simd_broadcast(a[i], ushort(5)) + simd_shuffle(a[i], ushort(31 - lane)) + simd_broadcast_first(a[i]);
