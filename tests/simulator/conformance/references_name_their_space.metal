// References and pointers to thread, device and threadgroup memory
uint i = thread_position_in_grid.x;
float x = a[i];
thread float& r = x;
r += 1.0f;
const thread float& c = x;
device float& d = out[i];
d = c * 2.0f;
thread float* p = &x;
*p = 0.0f;
out[i] += x;
