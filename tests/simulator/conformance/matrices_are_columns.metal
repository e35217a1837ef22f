// A matrix is an array of columns; matrix times vector
uint i = thread_position_in_grid.x;
float3x2 m = float3x2(float2(a[i], b[i]), float2(1.0f, 2.0f), float2(3.0f, 4.0f));
float2 v = m * float3(1.0f, a[i], b[i]);
out[3 * i] = v.x;
out[3 * i + 1] = v.y;
out[3 * i + 2] = m[2][1] + transpose(m)[0][2];
