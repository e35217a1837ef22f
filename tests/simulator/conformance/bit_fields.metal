// extract_bits extends the sign of a signed field; insert_bits replaces one
uint i = thread_position_in_grid.x;
out[3 * i] = extract_bits(a[i], 4, 8);
out[3 * i + 1] = int(extract_bits(uint(a[i]), 4, 8));
out[3 * i + 2] = insert_bits(a[i], 0x5a, 8, 8);
