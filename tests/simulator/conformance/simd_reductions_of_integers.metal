// simd_and, simd_or, simd_xor, simd_product, simd_min of integers
uint i = thread_position_in_grid.x;
uint lane = thread_index_in_simdgroup;
out[i] = (simd_and(a[i] | 1) << 20) + (simd_or(a[i]) << 8) + simd_xor(a[i]) + simd_min(a[i]) * simd_product(lane < 3 ? 2 : 1);
