// A swizzle reads any elements in any order, with repetition
uint i = thread_position_in_grid.x;
float4 v = float4(a[i], a[i] + 1, a[i] + 2, a[i] + 3);
float4 w = v.wzyx + v.xxyy + v.rgba;
for (int k = 0; k < 4; k++) out[4 * i + k] = w[k];
