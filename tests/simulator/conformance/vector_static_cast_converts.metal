// static_cast between vectors converts each value
uint i = thread_position_in_grid.x;
half4 h = static_cast<half4>(float4(a[i], 0.1f, 1.0f / 3.0f, 2.0f));
for (int k = 0; k < 4; k++) out[4 * i + k] = float(h[k]);
