// A structure copies out of constant memory
struct pair { float x, y; };
uint i = thread_position_in_grid.x;
constant pair* pairs = (constant pair*)numbers;
pair p = pairs[i % 2];
auto q = *pairs;
out[i] = p.x + 10.0f * p.y + 100.0f * q.x + a[i];
