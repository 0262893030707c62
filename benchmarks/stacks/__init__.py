"""Stacks of sparse layers: our kernels beside sparse peers and the best dense engines, measured in one run."""
