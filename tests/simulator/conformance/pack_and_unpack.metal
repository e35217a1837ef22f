// pack_float_to_unorm4x8 rounds to nearest, unpack divides by 255
uint i = thread_position_in_grid.x;
uint p = pack_float_to_unorm4x8(float4(a[i], b[i], 0.5f, 2.0f));
float4 u = unpack_unorm4x8_to_float(p);
out[2 * i] = float(p >> 8);
out[2 * i + 1] = u.x + u.y;
