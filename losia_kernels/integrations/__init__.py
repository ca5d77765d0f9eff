"""LoSiA in the libraries people train with; each imports its library on its own."""
