"""Finding the fastest schedule: the space, the search, measuring, and the runs that tie them."""
