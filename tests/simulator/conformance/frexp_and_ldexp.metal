// frexp splits into fraction and exponent, ldexp joins them
uint i = thread_position_in_grid.x;
int e;
float f = frexp(a[i], e);
out[3 * i] = f;
out[3 * i + 1] = e;
out[3 * i + 2] = ldexp(f, e + 1);
