// numeric_limits of the scalar types
uint i = thread_position_in_grid.x;
out[i] = float(numeric_limits<half>::max()) + numeric_limits<int>::max() + float(numeric_limits<bfloat>::epsilon()) + (numeric_limits<float>::infinity() > 3e38f ? 1 : 0) + numeric_limits<uchar>::max();
