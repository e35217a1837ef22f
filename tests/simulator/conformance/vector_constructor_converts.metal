// A vector constructed from a vector of another type converts each value
uint i = thread_position_in_grid.x;
float4 v = float4(a[i], -a[i], a[i] + 0.5f, 2.75f);
int4 w = int4(v);
for (int k = 0; k < 4; k++) out[4 * i + k] = w[k];
