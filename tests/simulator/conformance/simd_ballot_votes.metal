// simd_ballot has a bit for each active lane; simd_any and simd_all
uint i = thread_position_in_grid.x;
uint lane = thread_index_in_simdgroup;
ulong v = (ulong)simd_ballot(a[i] > 0.0f);
out[i] = uint(v) + (simd_any(a[i] > 1e9f) ? 1u : 0u) + (simd_all(a[i] < 1e9f) ? 2u : 0u);
