"""What a checkpoint of a run of LoSiA holds: its plain model in a folder of its own, or a text."""

import re
from collections import Counter
from pathlib import Path

from ..layers.convert import SUBNET_KEYS
from .checksums import FILES, find_damage, read_sealed
from .folder import (
    MARKER,
    ModelFolder,
    Spec,
    Track,
    copy_side_file,
    size_of,
    untracked,
    write_model,
)
from .reading import read_json
from .writing import new_folder

OF_THE_RUN = (MARKER, "trainer_state.json")  # files of a checkpoint that its model has no use for
SHAPE = {  # of losia.json
    "step": int,
    "observing": [str],
    "groups": [str],
    "config": {"period": (int, str), "update_type": str, "importance": str},
    "files": FILES,
}


def export_checkpoint(checkpoint: str | Path, output: str | Path, track: Track = untracked) -> None:
    """Write the plain model of a LoSiA checkpoint, bit for bit; the checkpoint stays as it is.

    Args:
        checkpoint: a folder that the Trainer saved in a run of LoSiA. Its config, generation config
            and tokenizer are copied too; what belongs to subnets is left out.
        output: the new folder. In memory is one tensor at a time.
        track: goes through the tensors' names, and may show how far it is.

    Raises:
        ValueError: if ``checkpoint`` is no model folder or holds no subnets, or ``output`` exists.
    """
    with new_folder(output) as beside:
        folder = ModelFolder(checkpoint)
        damage = _damage(folder.path)
        if damage:
            raise ValueError(f"{checkpoint}: {damage}")
        layers = _subnet_layers(folder.specs)
        if not layers:
            raise ValueError(f"{checkpoint} holds no LoSiA subnets: it is a plain model")
        extra = {f"{layer}.{key}" for layer in layers for key in SUBNET_KEYS}
        specs = {name: spec for name, spec in folder.specs.items() if name not in extra}
        write_model(beside, folder, specs, folder.get, track)
        for file in folder.side_files():
            if file not in OF_THE_RUN:
                copy_side_file(file, folder.path, beside)


def describe_checkpoint(checkpoint: str | Path) -> str:
    """What a LoSiA checkpoint holds, as text: its step, who observes, and every kind of layer with
    its subnet.

    Of a plain model it says that, and its size. Raises ValueError if it is no model folder.
    """
    checkpoint = Path(checkpoint)
    specs = ModelFolder(checkpoint).specs
    damage = _damage(checkpoint)
    try:
        shapes = _subnet_shapes(checkpoint, specs)
    except ValueError as error:
        raise ValueError(f"{checkpoint}: {damage or error}") from None
    if not shapes:
        dtypes = ", ".join(
            sorted({str(dtype).removeprefix("torch.") for dtype, _ in specs.values()})
        )
        return f"plain model     no subnets; {len(specs)} tensors, {dtypes}, {size_of(specs.values()) / 1e6:,.2f} MB"
    lines: list[str] = []
    if (checkpoint / MARKER).exists():
        run = read_sealed(checkpoint / MARKER, SHAPE)
        config = run["config"]
        lines += [f"damaged         {damage}"] if damage else []
        lines += [
            f"step            {run['step']}",
            f"observing       {', '.join(run['observing']) or 'none'}",
            f"groups          {len(run['groups'])}, period {config['period']}, update {config['update_type']}",
            f"importance      {config['importance']}",
        ]
    elif (checkpoint / "trainer_state.json").exists():
        step = read_json(checkpoint / "trainer_state.json", {"global_step": int})["global_step"]
        lines.append(f"step            {step}; no {MARKER}: interrupted, or not of finetune")
    trained = sum(out * in_ for _, (out, in_) in shapes.values())
    total = sum(out * in_ for (out, in_), _ in shapes.values())
    lines += [
        f"layers          {len(shapes)}",
        f"trained values  {trained:,} of {total:,} in these layers",
        "",
    ]
    kinds = Counter((re.sub(r"\.\d+\.", ".*.", name), *sizes) for name, sizes in shapes.items())
    for (name, weight, subnet), count in kinds.items():
        lines.append(
            f"{count:4} x {name}  weight {weight[0]} x {weight[1]}  subnet {subnet[0]} x {subnet[1]}"
        )
    return "\n".join(lines)


def _damage(checkpoint: Path) -> str | None:
    """Which of a checkpoint's files is not as it was saved, and how, if its marker can tell."""
    if not (checkpoint / MARKER).exists():
        return None
    files = read_sealed(checkpoint / MARKER, {"files": FILES})["files"]
    return find_damage(checkpoint, files, checkpoint / MARKER)


def _subnet_layers(specs: dict[str, Spec]) -> list[str]:
    return [name.removesuffix(".subnet") for name in specs if name.endswith(".subnet")]


def _subnet_shapes(
    checkpoint: Path, specs: dict[str, Spec]
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Layer name -> shapes of its weight and its subnet, (out, in)."""
    shapes = {}
    for layer in _subnet_layers(specs):
        _, subnet = specs[f"{layer}.subnet"]
        if f"{layer}.weight" in specs:
            shapes[layer] = specs[f"{layer}.weight"][1], subnet
        else:  # tied to the embedding, under whose name it is saved; the subnet takes all inputs
            vocabulary = read_json(checkpoint / "config.json", {"vocab_size": int})["vocab_size"]
            shapes[layer] = (vocabulary, *subnet[1:]), subnet
        if {len(shape) for shape in shapes[layer]} != {2}:
            raise ValueError(f"{layer} and its subnet are no matrices")
    return shapes
