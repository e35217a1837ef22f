// A vector constructor lays its arguments end to end
uint i = thread_position_in_grid.x;
float4 v = float4(a[i], float2(b[i], 3.0f), 4.0f);
float3 w = float3(v.yz, a[i]);
for (int k = 0; k < 4; k++) out[7 * i + k] = v[k];
for (int k = 0; k < 3; k++) out[7 * i + 4 + k] = w[k];
