// A float has atomic addition
uint i = thread_position_in_grid.x;
atomic_fetch_add_explicit((device atomic<float>*)out, a[i], memory_order_relaxed);
