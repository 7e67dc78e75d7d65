"""What the mask of a call means: a band, padding, or data that a kernel has to read."""
