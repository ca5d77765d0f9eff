"""Import a peer whose package imports bitsandbytes for 8-bit optimizers that are not measured
here."""

import contextlib
import importlib
import sys
import types
from collections.abc import Iterator

from .base import MissingPeer

_PLACEHOLDERS = ("bitsandbytes", "bitsandbytes.optim", "bitsandbytes.optim.optimizer")


@contextlib.contextmanager
def placeholder_bitsandbytes() -> Iterator[None]:
    """Where bitsandbytes is not installed, empty modules of its name while a peer is imported."""
    if importlib.util.find_spec("bitsandbytes") is not None:
        yield
        return
    for name in _PLACEHOLDERS:
        sys.modules[name] = types.ModuleType(name)
    sys.modules["bitsandbytes.optim.optimizer"].Optimizer2State = object
    try:
        yield
    finally:
        for name in _PLACEHOLDERS:
            del sys.modules[name]


def import_peer(module: str) -> types.ModuleType:
    """Raises MissingPeer, saying why, when ``module`` cannot be imported."""
    try:
        with placeholder_bitsandbytes():
            return importlib.import_module(module)
    except ImportError as error:
        raise MissingPeer(f"{module.split('.')[0]} cannot be imported: {error}") from None
