// dot, cross, length and normalize
uint i = thread_position_in_grid.x;
float3 v = float3(a[i], b[i], 1.0f), w = float3(2.0f, a[i], -1.0f);
float3 c = cross(v, w);
out[5 * i] = dot(v, w);
for (int k = 0; k < 3; k++) out[5 * i + 1 + k] = c[k];
out[5 * i + 4] = length(v) + normalize(v).z;
