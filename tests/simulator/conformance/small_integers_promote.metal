// Arithmetic on char and short happens in int
uint i = thread_position_in_grid.x;
uchar x = uchar(a[i]);
short y = short(a[i] * 3);
out[i] = x * x + y * y - (uchar)(x + 200);
