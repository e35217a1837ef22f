// half matrices multiply into a float accumulator
uint i = thread_position_in_grid.x;
uint lane = thread_index_in_simdgroup;
simdgroup_half8x8 x, y;
simdgroup_float8x8 z(0.0f);
x.thread_elements()[0] = half(a[2 * lane]);
x.thread_elements()[1] = half(a[2 * lane + 1]);
reinterpret_cast<thread half2&>(y.thread_elements()) = half2(half(b[2 * lane]), half(b[2 * lane + 1]));
simdgroup_multiply_accumulate(z, x, y, z);
simdgroup_store(z, out, 8);
