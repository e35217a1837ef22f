// A thread's arrays are its own
uint i = thread_position_in_grid.x;
float v[8];
#pragma unroll
for (int k = 0; k < 8; k++) v[k] = a[i] * k;
float s = 0.0f;
for (int k = 7; k >= 0; k--) s += v[k] * v[(k + i) % 8];
out[i] = s;
