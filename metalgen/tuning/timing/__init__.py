"""Times on a device's clock: samples of one kernel, and races between several."""
