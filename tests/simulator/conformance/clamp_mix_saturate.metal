// clamp, mix, saturate and sign
uint i = thread_position_in_grid.x;
out[4 * i] = clamp(a[i], -1.0f, 1.0f);
out[4 * i + 1] = mix(a[i], b[i], 0.25f);
out[4 * i + 2] = saturate(a[i]);
out[4 * i + 3] = sign(a[i]);
