// half arithmetic rounds after every operation
uint i = thread_position_in_grid.x;
half x = half(a[i]), y = half(b[i]);
half p = x * y;
half q = p + x;
out[i] = q / half(3.0f);
