// A float converts to an integer towards zero
uint i = thread_position_in_grid.x;
out[i] = int(a[i]) + 1000 * short(b[i]);
