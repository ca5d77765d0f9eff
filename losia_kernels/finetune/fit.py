"""``losia-kernels estimate``: which rank factor, batch and context fit a GPU, by the memory model of
``estimate``."""

import json
import math
import re
import warnings
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from ..config import LoSiAConfig
from .estimate import GIB, LoSiA, ModelShape, Setting, estimate
from .hub import offline_if_unreachable

HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
CONTEXT = 2048  # of a sample, where the model reaches so far


def shape_of(model: str) -> ModelShape:
    """From the ``config.json`` of a local folder, or of a name on the hub, whose weights are
    left there. Raises ValueError if there is none or it is of another kind."""
    path = Path(model).expanduser() / "config.json"
    if not path.exists() and not path.parent.exists() and HUB_NAME.fullmatch(model):
        path = _config_from_hub(model)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        missing = f"{path} does not exist; give the folder of a Hugging Face model, or its name on the hub"
        raise ValueError(missing) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    return ModelShape.from_config(config)


def largest(shape: ModelShape, setting: Setting, field: str, budget: int) -> int:
    """The largest ``field`` ("batch" or "context") whose estimate stays within ``budget`` bytes; 0
    if 1 does not."""

    def fits(size: int) -> bool:
        return estimate(shape, replace(setting, **{field: size})).total <= budget  # type: ignore[arg-type]

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _config_from_hub(name: str) -> Path:
    """The model's config.json in the local cache, fetched if it is not there."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str):
        return Path(cached)
    try:
        with offline_if_unreachable():
            return Path(hf_hub_download(name, "config.json"))
    except (OSError, ValueError) as error:
        problem = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"there is no folder {name}, and its config.json is not to be had from the hub: {problem}"
        ) from None


def describe_fit(
    model: str,
    memory: float,
    context: int | None = None,
    output_dim_factor: float = 0.0,
    reserve: float = 1.0,
    moments: str = "float32",
    master: str = "float32",
    in_backward: bool = False,
    importance: str = "sensitivity",
    shape: str = LoSiAConfig.shape,
    moves: str = LoSiAConfig.moves,
) -> str:
    """What of LoSiA fits a GPU of ``memory`` GiB, as a table: for ``python -m losia_kernels
    estimate``.

    ``model`` is a folder with a ``config.json``, or a name on the hub; ``context`` is 2048 tokens,
    or what the model was made for if that is less; ``reserve`` GiB are left to the CUDA context and
    the allocator. ``moments`` and ``in_backward`` are LoSiAAdamW's; ``importance``, ``master``,
    ``shape`` and ``moves`` LoSiAConfig's (docs/memory.md). Raises ValueError for a config the
    memory model does not know or a memory smaller than the reserve.
    """
    if not 0 <= reserve < memory < math.inf:
        least = f"more than the reserve of {reserve} GiB (--reserve, at least 0)"
        raise ValueError(f"--memory must be finite and {least}, got {memory}")
    if not 0 <= output_dim_factor <= 1:
        raise ValueError(f"--output-dim-factor must be in [0, 1], got {output_dim_factor}")
    if moves != "importance" and importance != "sensitivity":
        warnings.warn(f"importance {importance} cannot act: moves {moves} has none", stacklevel=2)
    sizes, budget = shape_of(model), int((memory - reserve) * GIB)
    reach = sizes.positions or math.inf
    context = int(min(CONTEXT, reach)) if context is None else context
    state: dict[str, Any] = {
        "output_dim_factor": output_dim_factor,
        "fused_loss": True,
        "moments": moments,
        "in_backward": in_backward,
        "master": master,
        "importance": importance,
        "shape": shape,
        "moves": moves,
    }
    lines = [
        f"{model}: {sizes.parameters / 1e9:.2f}e9 values, {2 * sizes.parameters / GIB:.2f} GiB in bfloat16",
        f"memory {memory:g} GiB, of which {reserve:g} GiB are left to CUDA and its allocator",
        *(
            [f"* the longest context that the model was made for: {reach} tokens"]
            * (reach < math.inf)
        ),
        *([f"a context of {context} tokens is beyond what it was made for"] * (context > reach)),
        "",
        f"{'p':>5} {'trained':>10} {'checkpointing':>13} {f'batch at {context}':>13} "
        f"{'context at batch 1':>18} {f'GiB at 1 x {context}':>16}",
    ]
    for p in (Fraction(1, 16), Fraction(1, 8), Fraction(3, 20), Fraction(1, 4), Fraction(1, 2)):
        for checkpointing in (False, True):
            setting = LoSiA(1, context, checkpointing, rank_factor=float(p), **state)
            one = estimate(sizes, setting)
            batch, longest = (
                largest(sizes, setting, field, budget) for field in ("batch", "context")
            )
            reached = f"{reach}*" if longest >= reach else longest or "none"
            lines.append(
                f"{str(p):>5} {one.trained_values / 1e6:>9.1f}M {'yes' if checkpointing else 'no':>13} "
                f"{batch or 'none':>13} {reached:>18} {one.total / GIB:>16.2f}"
            )
    return "\n".join(lines)
