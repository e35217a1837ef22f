// A packed vector in device memory takes a vector, and single elements
uint i = thread_position_in_grid.x;
device packed_float3* p = (device packed_float3*)out;
p[i] = float3(a[i], 2.0f, 3.0f) * 2.0f;
p[i].y = b[i];
p[i][2] += 1.0f;
