// Integer division truncates towards zero; the remainder has the dividend's sign
uint i = thread_position_in_grid.x;
out[2 * i] = a[i] / b[i];
out[2 * i + 1] = a[i] % b[i];
