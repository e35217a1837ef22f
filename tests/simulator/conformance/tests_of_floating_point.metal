// isnan, isinf, isfinite, signbit
uint i = thread_position_in_grid.x;
float inf = INFINITY;
out[i] = isnan(a[i] - a[i] + NAN) + 2 * isinf(-inf) + 4 * isfinite(a[i]) + 8 * signbit(-0.0f) + 16 * isnan(half(1.0f));
