// reverse_bits and rotate
uint i = thread_position_in_grid.x;
out[2 * i] = reverse_bits(a[i]);
out[2 * i + 1] = rotate(a[i], 37u);
