// simd_shuffle_xor reads the lane whose number differs in the mask's bits
uint i = thread_position_in_grid.x;
uint lane = thread_index_in_simdgroup;
out[i] = simd_shuffle_xor(a[i], ushort(1)) + 2.0f * simd_shuffle_xor(a[i], ushort(8));
