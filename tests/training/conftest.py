"""Fixtures of the tests of training."""

from tests.training.fake_graphs import graphs

__all__ = ["graphs"]
