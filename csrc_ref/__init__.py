"""Oracles: LoSiA (arXiv 2507.04487) in float64, shaped like the paper's equations, slow and
obvious.

A file has the name of what it is the oracle of: an op, or a part of the training. Nothing here
imports the package, so the two can be wrong only independently. The paper writes a weight as [in,
out]; here, as in ``nn.Linear``, a weight is [out, in]. Order is always (out, in).
"""
