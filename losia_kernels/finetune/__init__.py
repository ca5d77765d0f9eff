"""The command's run: from a model and data to a folder with the result."""
