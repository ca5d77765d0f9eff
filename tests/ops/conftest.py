from tests.kernels.conftest import poisoned_outputs, seeded  # noqa: F401
