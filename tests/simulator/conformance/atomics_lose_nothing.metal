// Atomic additions by all threads lose nothing
uint i = thread_position_in_grid.x;
device atomic_int* counter = (device atomic_int*)out;
atomic_fetch_add_explicit(counter, a[i], memory_order_relaxed);
atomic_fetch_max_explicit(counter + 1, a[i], memory_order_relaxed);
atomic_fetch_or_explicit(counter + 2, 1 << (a[i] & 7), memory_order_relaxed);
