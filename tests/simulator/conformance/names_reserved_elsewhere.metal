// Words that OpenCL reserves are free in Metal
uint i = thread_position_in_grid.x;
float local = a[i], global = b[i];
for (int pipe = 0; pipe < 2; pipe++) local += global;
out[i] = local;
