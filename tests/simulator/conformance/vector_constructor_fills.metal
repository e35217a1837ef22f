// A vector constructed from one scalar holds it in every element
uint i = thread_position_in_grid.x;
float4 v = float4(a[i]);
int2 w(7);
out[i] = v.x + v.y + v.z + v.w + w.x + w.y;
