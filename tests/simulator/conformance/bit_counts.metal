// popcount, clz and ctz; of zero they count the width
uint i = thread_position_in_grid.x;
out[4 * i] = popcount(a[i]);
out[4 * i + 1] = clz(a[i]);
out[4 * i + 2] = ctz(a[i]);
out[4 * i + 3] = clz(ushort(a[i])) + ctz(uchar(0));
