"""The hub without a network: what is not in the cache is said at once, not after all attempts."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """Where the hub cannot be reached its libraries are offline in here: they look into their cache
    alone, where they would try each file for half a minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    before = constants.HF_HUB_OFFLINE
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception:  # of whichever HTTP library the hub's is built on
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
