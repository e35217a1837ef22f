// The suffixes h and bf make half and bfloat
uint i = thread_position_in_grid.x;
out[i] = (sizeof(1.0h) == 2 && sizeof(1.0bf) == 2 ? 1.0f : 0.0f) + float(0.1h) + float(0.1bf);
