// mulhi is the upper half of the product
uint i = thread_position_in_grid.x;
out[2 * i] = mulhi(int(a[i]), int(b[i]));
out[2 * i + 1] = int(mulhi(uint(a[i]), uint(b[i])));
