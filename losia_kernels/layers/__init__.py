"""What stands in the model in the place of its linears."""
