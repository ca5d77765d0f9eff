"""The records of a run, in JSON lines: reading and rewinding them, and where its subnets have been.

``subnets.jsonl`` begins with ``{"step": 0, "groups": [name, ...], "config": {...}}``. Each other
line is a Place: a layer's first subnet, then each that it was relocalized to. Indices are bitmaps
of the layer's neurons, in base64.
"""

import base64
import json
import math
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from ..checkpoint.reading import check_shape
from ..checkpoint.writing import write_text
from ..layers.module import SubnetModule
from ..layers.subnet import Subnet
from ..training.timeline import Timeline

_SHARE = (float, int, type(None))
PLACE = {"step": int, "layer": str, "group": str, "features": [int], "out_idx": str, "in_idx": str}
PLACE |= {"overlap": _SHARE, "captured": _SHARE}
HEAD = {
    "groups": [str],
    "config": {
        "period": int,
        "update_type": str,
        "warmup_steps": int,
        "rewarm": bool,
        "rank_factor": (float, int),
    },
}


def read_log(path: Path) -> list[dict]:
    """The entries of a log file. A last line cut off by a crash is left out, others that cannot be
    read with a warning."""
    entries, damaged = _read_lines(path)
    if damaged:
        warnings.warn(f"{path}: line {damaged[0]} cannot be read, left out", stacklevel=2)
    return entries


def _read_lines(path: Path) -> tuple[list[dict], list[int]]:
    """The entries of a log file, and the numbers of lines that are none."""
    lines = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    entries, damaged = [], []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict) or type(entry.get("step")) is not int:
                raise ValueError("no entry")
            entries.append(entry)
        except (ValueError, RecursionError):
            cut_off = number == len(lines) and line[:1] in (b"", b"{")
            if not cut_off:
                damaged.append(number)
    return entries, damaged


def rewind_log(path: Path, step: int) -> None:
    """Drop the entries after ``step``: a run resumed from there writes them anew. A file with lines
    that cannot be read is kept under another name."""
    entries, damaged = _read_lines(path)
    if damaged:
        shutil.copyfile(path, path.with_name(f"damaged-{path.name}"))
    kept = [entry for entry in entries if entry["step"] <= step]
    write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))


def append_log(path: Path, entries: list[dict]) -> None:
    """Add ``entries`` to a log file."""
    with open(path, "a") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in entries)


@dataclass(frozen=True)
class Place:
    """Where a layer's subnet is after ``step`` optimizer steps, until the layer's next Place.

    ``features`` (out, in) are the layer's neurons, ``out_idx`` and ``in_idx`` (numpy, int64,
    sorted) the chosen ones. ``overlap``: share of the subnet's weights that the one before had too;
    None for the first. ``captured``: share of the score that it was selected by; None where no
    score of single weights exists.
    """

    step: int
    layer: str
    group: str
    features: tuple[int, int]
    out_idx: np.ndarray
    in_idx: np.ndarray
    overlap: float | None = None
    captured: float | None = None

    @classmethod
    def first(cls, layer: SubnetModule) -> "Place":
        """Where ``layer`` is before the first step."""
        return cls(
            0,
            layer.name,
            _group_of(layer),
            (layer.out_features, layer.in_features),
            _numpy(layer.out_idx),
            _numpy(layer.in_idx),
        )

    @classmethod
    def after(cls, layer: SubnetModule, subnet: Subnet, step: int) -> "Place":
        """Where ``layer``, which has not moved yet, will be. Waits for the GPU."""
        captured = math.nan if subnet.captured is None else float(subnet.captured)
        return cls(
            step,
            layer.name,
            _group_of(layer),
            (layer.out_features, layer.in_features),
            _numpy(subnet.out_idx),
            _numpy(subnet.in_idx),
            overlap=subnet.overlap(layer.current_subnet),
            captured=captured if math.isfinite(captured) else None,
        )

    def to_json(self) -> dict:
        """The line of ``subnets.jsonl``."""
        return {
            **vars(self),
            "out_idx": _bits(self.out_idx, self.features[0]),
            "in_idx": _bits(self.in_idx, self.features[1]),
        }

    @classmethod
    def from_json(cls, entry: dict) -> "Place":
        """What ``to_json`` wrote. Raises ValueError for anything else."""
        check_shape(entry, PLACE, "a place")
        if entry.keys() != PLACE.keys() or entry["step"] < 0 or len(entry["features"]) != 2:
            raise ValueError(f"a place is of another shape: {entry!r:.80}")
        out_features, in_features = entry["features"]
        return cls(
            **{
                **entry,
                "features": (out_features, in_features),
                "out_idx": _indices(entry["out_idx"], out_features),
                "in_idx": _indices(entry["in_idx"], in_features),
            }
        )


@dataclass(frozen=True)
class SubnetHistory:
    """All of ``subnets.jsonl``: the groups in model order, the LoSiAConfig as a dict, the places in
    order of time."""

    groups: list[str]
    config: dict
    places: list[Place]

    @staticmethod
    def begin(path: Path, timeline: Timeline) -> None:
        """Write the head and every layer's first place."""
        layers = timeline.layers
        head = {"step": 0, "groups": timeline.group_names, "config": timeline.config.to_dict()}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        append_log(path, [head, *(Place.first(layer).to_json() for layer in layers)])

    @classmethod
    def read(cls, path: Path) -> "SubnetHistory":
        """Raises FileNotFoundError if there is no history, ValueError if it is none."""
        if not path.exists():
            raise FileNotFoundError(f"no {path}: it was not recorded where the run's subnets were")
        head, *entries = read_log(path) or [{}]
        try:
            check_shape(head, HEAD, "its head")
            places = [Place.from_json(entry) for entry in entries]
            begun: set[str] = set()
            for place in places:
                if place.group not in head["groups"] or (place.step and place.layer not in begun):
                    raise ValueError(f"{place.layer} has no first place, or an unknown group")
                begun.add(place.layer)
        except ValueError as error:
            raise ValueError(f"{path} is damaged, or no record of subnets: {error}") from None
        return cls(head["groups"], head["config"], places)

    def of_layers(self) -> dict[str, list[Place]]:
        """Each layer's places, in order of time; layers in model order."""
        layers: dict[str, list[Place]] = {}
        for place in self.places:
            layers.setdefault(place.layer, []).append(place)
        return layers


def _group_of(layer: SubnetModule) -> str:
    assert layer.membership is not None  # of a trained layer
    return layer.membership.group_name


def _numpy(idx: Tensor) -> np.ndarray:
    return idx.cpu().numpy().copy()


def _bits(idx: np.ndarray, features: int) -> str:
    chosen = np.zeros(features, dtype=bool)
    chosen[idx] = True
    return base64.b64encode(np.packbits(chosen).tobytes()).decode()


def _indices(bits: str, features: int) -> np.ndarray:
    """Raises ValueError where the bits are not of so many neurons: what a file says of sizes decides
    what memory is taken."""
    packed = np.frombuffer(base64.b64decode(bits), dtype=np.uint8)
    if len(packed) != -(-features // 8) or np.unpackbits(packed)[features:].any():
        raise ValueError(f"{8 * len(packed)} bits are not those of {features} neurons")
    return np.flatnonzero(np.unpackbits(packed))
