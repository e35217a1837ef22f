// A cast through an alias of a vector type converts each value
uint i = thread_position_in_grid.x;
using wide = vec<int, 4>;
typedef metal::uchar4 bytes;
wide w = wide(float4(a[i], -a[i], a[i] * 2, 9.9f));
bytes q = bytes(w.x & 255, 1, 2, 3);
for (int k = 0; k < 4; k++) out[4 * i + k] = w[k] + q[k];
