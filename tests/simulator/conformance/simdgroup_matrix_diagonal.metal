// A simdgroup_matrix constructed from a scalar is diagonal
uint i = thread_position_in_grid.x;
uint lane = thread_index_in_simdgroup;
simdgroup_float8x8 m(3.0f);
simdgroup_store(m, out, 8);
