// A swizzle on the left writes just its elements
uint i = thread_position_in_grid.x;
float4 v = float4(0.0f);
v.xz = float2(a[i], b[i]);
v.w += 5.0f;
v[1] = -1.0f;
for (int k = 0; k < 4; k++) out[4 * i + k] = v[k];
