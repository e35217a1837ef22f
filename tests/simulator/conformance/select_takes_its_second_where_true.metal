// select(a, b, c) takes b where c is true
uint i = thread_position_in_grid.x;
float2 v = select(float2(a[i]), float2(b[i]), float2(a[i], b[i]) < float2(0.0f));
out[2 * i] = v.x + select(0.0f, 1.0f, a[i] > b[i]);
out[2 * i + 1] = v.y;
