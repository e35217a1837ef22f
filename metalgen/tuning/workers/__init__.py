"""What builds, times and checks kernels: this process, or helper processes that may crash."""
