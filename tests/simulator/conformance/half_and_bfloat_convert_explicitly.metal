// half converts to bfloat and back, through its value
uint i = thread_position_in_grid.x;
half h = half(a[i]);
bfloat t = static_cast<bfloat>(h);
half back = static_cast<half>(t);
out[i] = float(t) + 2.0f * float(back);
