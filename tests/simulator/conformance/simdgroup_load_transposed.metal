// simdgroup_load with transpose reads columns; origin moves the window
uint i = thread_position_in_grid.x;
uint lane = thread_index_in_simdgroup;
simdgroup_float8x8 m;
simdgroup_load(m, a, 16, ulong2(8, 0), true);
simdgroup_store(m, out, 8);
