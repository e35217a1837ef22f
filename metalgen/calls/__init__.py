"""From arrays and options to a request, from that to a kernel, and its checks and gradients."""
