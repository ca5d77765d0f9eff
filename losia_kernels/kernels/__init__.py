"""The Triton kernels: one file an operation; ``launch`` chooses their tiles."""
