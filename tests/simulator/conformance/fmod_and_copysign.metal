// fmod has the dividend's sign; copysign copies a sign
uint i = thread_position_in_grid.x;
out[2 * i] = fmod(a[i], 1.5f);
out[2 * i + 1] = copysign(a[i], b[i]);
