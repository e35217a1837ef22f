// step and smoothstep
uint i = thread_position_in_grid.x;
out[2 * i] = step(0.5f, a[i]);
out[2 * i + 1] = smoothstep(-1.0f, 2.0f, a[i]);
