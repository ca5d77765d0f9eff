"""Who trains together, and where the weights live."""
