// A right shift of a negative number keeps its sign; of an unsigned one brings zeros
uint i = thread_position_in_grid.x;
out[i] = (a[i] >> 3) + int(uint(a[i]) >> 29);
