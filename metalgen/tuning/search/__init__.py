"""Which schedule to try next: the space, what a search begins with, and how it goes on."""
