// Unsigned arithmetic wraps
uint i = thread_position_in_grid.x;
out[i] = (a[i] - 7u) * 3000000019u;
