// fma rounds once
uint i = thread_position_in_grid.x;
out[i] = fma(a[i], b[i], -1.0f);
