// rint rounds half to even, round away from zero, trunc towards zero
uint i = thread_position_in_grid.x;
float x = a[i] * 0.5f;
out[4 * i] = rint(x);
out[4 * i + 1] = round(x);
out[4 * i + 2] = trunc(x);
out[4 * i + 3] = fract(x);
