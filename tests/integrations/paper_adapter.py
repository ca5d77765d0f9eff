"""The paper's method as a PEFT adapter, as tests.tiny.paper has it for apply_losia."""

from losia_kernels.integrations.peft import LoSiAPeftConfig
from tests.tiny import PAPER


def paper_adapter(**changes) -> LoSiAPeftConfig:
    """A config of the paper's method with ``changes``."""
    return LoSiAPeftConfig(**{"rank_factor": 1 / 8} | PAPER | changes)
