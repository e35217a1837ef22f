// A literal with a point and no suffix is a float
uint i = thread_position_in_grid.x;
out[i] = sizeof(0.1) == 4 ? 0.1 + a[i] : 0;
