// A packed vector has no padding; a vector of three has room for four
uint i = thread_position_in_grid.x;
const device packed_float3* p = (const device packed_float3*)a;
float3 v = p[i];
out[i] = v.x + 10.0f * v.y + 100.0f * v.z + (sizeof(packed_float3) == 12 && sizeof(float3) == 16 && sizeof(half3) == 8 && alignof(packed_half2) == 2 ? 0 : 1e9f);
