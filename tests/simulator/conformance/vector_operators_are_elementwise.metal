// Operators on vectors work element by element, with a scalar on either side
uint i = thread_position_in_grid.x;
float3 v = float3(a[i], b[i], 2.0f);
float3 w = 1.0f / v * 3.0f - v;
for (int k = 0; k < 3; k++) out[3 * i + k] = w[k];
