// atomic_compare_exchange_weak_explicit gives back what it found
uint i = thread_position_in_grid.x;
device atomic_uint* p = (device atomic_uint*)out;
uint seen = atomic_load_explicit(p, memory_order_relaxed);
while (!atomic_compare_exchange_weak_explicit(p, &seen, seen * 3u + 1u, memory_order_relaxed, memory_order_relaxed)) {}
