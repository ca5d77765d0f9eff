"""How fast, and in how much memory: kernels, layers and whole models, behind a gate."""
