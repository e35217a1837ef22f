// as_type keeps the bits
uint i = thread_position_in_grid.x;
out[i] = as_type<uint>(a[i]) ^ as_type<uint>(half2(half(a[i]), half(1.0f)));
