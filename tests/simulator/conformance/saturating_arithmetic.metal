// addsat and subsat saturate, absdiff and hadd do not overflow
uint i = thread_position_in_grid.x;
out[4 * i] = addsat(a[i], b[i]);
out[4 * i + 1] = subsat(a[i], b[i]);
out[4 * i + 2] = int(absdiff(a[i], b[i]));
out[4 * i + 3] = hadd(a[i], b[i]);
