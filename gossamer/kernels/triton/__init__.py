"""Kernels for GPUs in Triton, which is optional and slow to load: imported by the first product that runs on one."""
