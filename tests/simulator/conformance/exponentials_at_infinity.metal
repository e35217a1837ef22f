// exp and exp2 of minus infinity are zero
uint i = thread_position_in_grid.x;
out[i] = exp(-INFINITY) + fast::exp2(-INFINITY) + exp2(a[i]) + precise::exp(b[i]) + metal::log2(4.0f);
