// Lane l holds row (q & 4) + l / 2 % 4, columns (q & 2) * 2 + l % 2 * 2 and the next, with q = l / 4
uint i = thread_position_in_grid.x;
uint lane = thread_index_in_simdgroup;
simdgroup_float8x8 m;
simdgroup_load(m, a, 8);
out[2 * lane] = m.thread_elements()[0];
out[2 * lane + 1] = m.thread_elements()[1];
