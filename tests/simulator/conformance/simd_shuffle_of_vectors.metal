// A vector is shuffled whole
uint i = thread_position_in_grid.x;
uint lane = thread_index_in_simdgroup;
float4 v = float4(a[i], 1.0f, 2.0f, a[i] * 2.0f);
float4 w = simd_shuffle_xor(v, ushort(4));
out[i] = w.x + w.w + simd_sum(half(1.0f)) + float(simd_shuffle_xor(bfloat(a[i]), ushort(2)));
