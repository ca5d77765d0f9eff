"""What a training changed of its base as a PEFT LoRA adapter, for servers that take nothing else.

A subnet is a block of k_out outputs x k_in inputs, so its change is exactly a LoRA of rank
min(k_out, k_in), one of whose factors selects the block's outputs or inputs. After relocalizations
the blocks of a layer are many, and the exact LoRA has the rank of all that they touch; a smaller
one is the best approximation of its rank (truncated SVD), and says how far off it is.

Factors are float32 and alpha = r in every layer: the adapter adds B @ A. Needs safetensors and
transformers.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from .checksums import FILES, all_files, checksums, find_damage, read_sealed, write_sealed
from .folder import ModelFolder, Track, check_pair, untracked, write_tensors
from .reading import read_json
from .writing import new_folder, write_json

CONFIG, WEIGHTS, ERRORS = "adapter_config.json", "adapter_model.safetensors", "lora_error.json"
SHAPE = {  # of lora_error.json
    "relative_error": float,
    "merged_error": float,
    "layers": {str: {"rank": int, "relative_error": float, "merged_error": float, "norm": float}},
    "files": FILES,
}


@dataclass
class LayerError:
    """How far one layer's LoRA is from what the training changed, both as Frobenius norms over that
    of the change D.

    ``relative_error``: |B A - D| / |D|, of the float32 factors in float64. ``merged_error``: the
    same of the weight that merging gives, |(W_base + B A) - W_trained| / |D|, rounded to the
    trained dtype. ``norm``: |D|.
    """

    rank: int
    relative_error: float
    merged_error: float
    norm: float


def export_lora(
    base: str | Path,
    trained: str | Path,
    output: str | Path,
    rank: int | None = None,
    track: Track = untracked,
) -> dict[str, LayerError]:
    """Write the change from ``base`` to ``trained`` as a PEFT LoRA adapter.

    Args:
        base: the model before the training, a ``save_pretrained`` folder with safetensors.
        trained: the model after it; both are read tensor by tensor.
        output: the new folder; its ``lora_error.json`` holds what this returns.
        rank: at most this in every layer; a layer whose exact rank is larger gets its best
            approximation. None: exact everywhere.
        track: goes through the tensors' names, and may show how far it is.

    Returns:
        The errors by layer.

    Raises:
        ValueError: if anything but weights of linear layers has changed (norms, biases,
            embeddings, tied output layers, fused experts), if the folders are not base and result
            of one training, if nothing has changed, or if ``output`` exists.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"the rank must be at least 1, got {rank}")
    with new_folder(output) as beside:
        old, new = ModelFolder(base), ModelFolder(trained)
        names, _ = check_pair(old, new)
        layouts = _linear_layouts(old.path, len(old.specs))
        tensors, errors = _factor_all(old, new, track(names, "comparing"), layouts, rank)
        specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        write_tensors(beside / WEIGHTS, specs, tensors.__getitem__, {"format": "pt"})
        write_json(beside / CONFIG, _adapter_config(old.path, errors, "in_out" in layouts.values()))
        record = {
            "relative_error": overall(errors, "relative_error"),
            "merged_error": overall(errors, "merged_error"),
            "layers": {layer: asdict(error) for layer, error in errors.items()},
            "files": checksums(beside, all_files(beside)),
        }
        write_sealed(beside / ERRORS, record)
    return errors


def _factor_all(
    old: ModelFolder,
    new: ModelFolder,
    names: Iterable[str],
    layouts: dict[str, str],
    rank: int | None,
) -> tuple[dict[str, Tensor], dict[str, LayerError]]:
    """The adapter's tensors, and the errors by layer."""
    tensors: dict[str, Tensor] = {}
    errors: dict[str, LayerError] = {}
    for name in names:
        after = new.get(name)
        before = old.get(name).to(after.dtype)  # as it was when training began
        if torch.equal(before, after):
            continue
        layer = name.removesuffix(".weight")
        if layer == name or layer not in layouts:
            raise ValueError(
                f"a LoRA holds linear layers' weights only, and the training changed {name}: use a delta"
            )
        if layouts[layer] == "in_out":  # transformers' Conv1D
            before, after = before.T, after.T
        difference = after.double() - before.double()
        if not difference.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite")
        lora_b, lora_a = factor(difference, rank)
        tensors[f"base_model.model.{layer}.lora_A.weight"] = lora_a
        tensors[f"base_model.model.{layer}.lora_B.weight"] = lora_b
        change = lora_b.double() @ lora_a.double()
        merged = (before.float() + change.float()).to(after.dtype).double()
        norm = difference.norm().item()
        errors[layer] = LayerError(
            rank=len(lora_a),
            relative_error=(change - difference).norm().item() / norm,
            merged_error=(merged - after.double()).norm().item() / norm,
            norm=norm,
        )
    if not errors:
        raise ValueError(f"{new.path} is {old.path}: nothing has changed")
    return tensors, errors


def factor(difference: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """B [out, r] and A [r, in], float32, with B @ A the float64 ``difference`` [out, in], or the
    best of rank ``rank``.

    r is the smaller number of outputs and inputs that are not all zero, at most ``rank``.
    """
    out_idx, in_idx = difference.any(1).nonzero().flatten(), difference.any(0).nonzero().flatten()
    block = difference[out_idx][:, in_idx]
    if len(out_idx) > len(in_idx):
        lora_a, lora_b = factor(difference.T, rank)
        return lora_b.T.contiguous(), lora_a.T.contiguous()
    selected = torch.eye(len(out_idx), dtype=torch.float64)
    if rank is not None and rank < len(out_idx):
        # the first left singular vectors
        selected = torch.linalg.eigh(block @ block.T).eigenvectors[:, -rank:]
    lora_b = difference.new_zeros(len(difference), selected.shape[1])
    lora_a = difference.new_zeros(selected.shape[1], difference.shape[1])
    lora_b[out_idx] = selected
    lora_a[:, in_idx] = selected.T @ block
    return lora_b.float(), lora_a.float()


def overall(errors: dict[str, LayerError], kind: str) -> float:
    """The error of all layers as of one long vector: root of the summed squares, over that of the
    changes."""
    squares = sum((getattr(error, kind) * error.norm) ** 2 for error in errors.values())
    return math.sqrt(squares / sum(error.norm**2 for error in errors.values()))


def describe_lora(folder: str | Path) -> str:
    """What a folder of ``export_lora`` holds, as text: ranks and errors, overall and of every kind
    of layer."""
    folder = Path(folder)
    errors = read_sealed(folder / ERRORS, SHAPE)
    damage = find_damage(folder, errors["files"], folder / ERRORS)
    if damage:
        raise ValueError(f"{folder} is damaged: {damage}")
    config = read_json(folder / CONFIG, {"base_model_name_or_path": str})
    layers = errors["layers"]
    ranks = sorted({layer["rank"] for layer in layers.values()})
    size = (folder / WEIGHTS).stat().st_size
    lines = [
        f"LoRA     of {config['base_model_name_or_path']}: {len(layers)} layers, "
        f"rank {ranks[0]}{f' to {ranks[-1]}' if len(ranks) > 1 else ''}, {size / 1e6:,.2f} MB",
        f"error    {errors['relative_error']:.2e} of the change; {errors['merged_error']:.2e} when merged and rounded",
        "",
    ]
    kinds: dict[str, list[LayerError]] = {}
    for name, layer in layers.items():
        error = LayerError(**{field.name: layer[field.name] for field in fields(LayerError)})
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(error)
    for name, each in kinds.items():
        ranks = sorted({error.rank for error in each})
        rank = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else ranks[0]
        far, merged = (
            max(getattr(error, kind) for error in each)
            for kind in ("relative_error", "merged_error")
        )
        lines.append(
            f"{len(each):4} x {name}  rank {rank}  error up to {far:.2e}, merged {merged:.2e}"
        )
    return "\n".join(lines)


def _linear_layouts(folder: Path, tensors: int) -> dict[str, str]:
    """Names of the model's linears, each with the order of its weight's dimensions: "out_in", or
    "in_out" (Conv1D).

    From a model without memory, which has so many ``tensors``. One that shares its weight with an
    embedding is none: LoRA would change only one.
    """
    import transformers
    from transformers.pytorch_utils import Conv1D

    read_json(folder / "config.json", {"architectures": [str]})
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder}: {str(error).strip().splitlines()[0]}") from None
    if getattr(config, "num_hidden_layers", 0) > tensors:
        raise ValueError(
            f"{folder}: {config.num_hidden_layers} layers in config.json, and {tensors} tensors"
        )
    model_class = getattr(transformers, (config.architectures or ["none"])[0], None)
    known = isinstance(model_class, type) and issubclass(model_class, transformers.PreTrainedModel)
    if model_class is None or not known:
        raise ValueError(f"{folder}: transformers has no model {config.architectures}")
    with torch.device("meta"):
        model = model_class(config)
    layouts = {}
    shared = (
        dict(model.named_parameters(remove_duplicate=False)).keys()
        - dict(model.named_parameters()).keys()
    )
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)) and f"{name}.weight" not in shared:
            layouts[name] = "in_out" if isinstance(module, Conv1D) else "out_in"
    return layouts


def _adapter_config(base: Path, errors: dict[str, LayerError], fan_in_fan_out: bool) -> dict:
    """PEFT's LoraConfig. A server that knows no rank_pattern finds alpha / r = 1 as well."""
    most = max(error.rank for error in errors.values())
    pattern = {layer: error.rank for layer, error in errors.items() if error.rank != most}
    architecture = read_json(base / "config.json", {"architectures": [str]})["architectures"][0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if architecture.endswith("ForCausalLM") else None,
        "base_model_name_or_path": str(base),
        "r": most,
        "lora_alpha": most,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": list(errors),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "inference_mode": True,
    }
