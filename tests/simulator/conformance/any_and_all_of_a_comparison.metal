// any and all reduce the comparison of vectors
uint i = thread_position_in_grid.x;
float4 v = float4(a[i], b[i], 1.0f, -1.0f);
bool4 m = v > float4(0.0f);
out[i] = (any(v > 2.0f) ? 1 : 0) + (all(v > -2.0f) ? 2 : 0) + (m.x ? 4 : 0) + (any(!m) ? 8 : 0);
