// Quad functions work within four lanes
uint i = thread_position_in_grid.x;
uint lane = thread_index_in_simdgroup;
out[i] = quad_sum(a[i]) + 100.0f * quad_shuffle_xor(a[i], ushort(2)) + 10000.0f * quad_broadcast(a[i], ushort(1));
