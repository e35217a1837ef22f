// bfloat arithmetic rounds after every operation
uint i = thread_position_in_grid.x;
bfloat x = bfloat(a[i]), y = bfloat(b[i]);
bfloat p = x * y;
out[i] = p + x;
