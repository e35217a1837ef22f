// simdgroup_multiply_accumulate is A B + C
uint i = thread_position_in_grid.x;
uint lane = thread_index_in_simdgroup;
simdgroup_float8x8 x, y, z = make_filled_simdgroup_matrix<float, 8, 8>(2.0f);
simdgroup_load(x, a, 8);
simdgroup_load(y, b, 8);
simdgroup_multiply_accumulate(z, x, y, z);
simdgroup_store(z, out, 8);
