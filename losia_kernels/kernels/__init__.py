"""The Triton kernels: one file an operation, its tiles included."""
