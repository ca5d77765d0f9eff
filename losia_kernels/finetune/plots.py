"""``losia-kernels plot RUN``: pictures of a run, as PNG files in ``RUN/plots/``.

loss.png              loss by step, with the moves of subnets
timeline.png          who observes and is rewarmed when; how much of its subnet each move kept, and what it captured
subnets.png           which neurons are trained, over layers and time (the paper's Figure 3)
frequency.png         how often each neuron is selected (Figure 7)
gradients.png         row and column sums of |g| of the model before training (Figures 2 and 9)
singular_vectors.png  how far training has turned the weights' singular vectors (Figure 8)
"""

import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM
from transformers.utils import logging
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from .. import LoSiAConfig
from ..integrations.history import SubnetHistory, read_log
from .data import fingerprint, load_data
from .draw import (
    draw_frequency,
    draw_gradients,
    draw_singular_vectors,
    draw_subnets,
    draw_timeline,
)
from .folder import read_options, read_record, write_failure
from .model import load_model, load_tokenizer
from .options import PICTURES, FinetuneOptions, InputError
from .progress import draw_loss_curve
from .spectra import gradient_sums, singular_vector_similarity
from .trainer import sft_config

# What must be there for a picture; for the others subnets.jsonl.
SOURCES = {"loss": "log.jsonl", "gradients": "run.json", "singular_vectors": "run.json"}
OF_HISTORY = {"timeline": draw_timeline, "subnets": draw_subnets, "frequency": draw_frequency}
GRADIENT_BATCHES = 4


def plot_run(
    run: Path, only: Sequence[str] | None = None, vectors: int = 500, base: str | None = None
) -> list[Path]:
    """Draw the pictures named in ``only``, by default all that ``run`` has what it takes for, and
    return their files.

    ``gradients`` and ``singular_vectors`` load the base model that ``run.json`` names, or ``base``;
    of singular vectors the first ``vectors``. Raises InputError if ``run`` lacks what a picture is
    made from.
    """
    if vectors < 1:
        raise InputError(f"--vectors must be at least 1, got {vectors}")
    if not any(os.path.exists(run / name) for name in ("log.jsonl", "subnets.jsonl")):
        raise InputError(f"{run} holds no run: it has neither log.jsonl nor subnets.jsonl")
    logging.disable_progress_bar()
    names = only or [
        name for name in PICTURES if (run / SOURCES.get(name, "subnets.jsonl")).exists()
    ]
    for given, pictures in (
        ("--base", {"gradients", "singular_vectors"} if base else names),
        ("--vectors", {"singular_vectors"} if vectors != 500 else names),
    ):
        if not set(pictures) & set(names):
            warnings.warn(
                f"{given} cannot act: it is for {' and '.join(sorted(pictures))}", stacklevel=2
            )
    try:
        (run / "plots").mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {run / 'plots'}: {error.strerror}") from None
    try:
        return _draw_all(run, names, vectors, base)
    except OSError as error:
        problem = write_failure(error)
        if problem is None:
            raise
        raise InputError(f"cannot write {run / 'plots'}: {problem}") from None


def _draw_all(run: Path, names: Sequence[str], vectors: int, base: str | None) -> list[Path]:
    drawn = []
    for name in names:
        picture = run / "plots" / f"{name}.png"
        if name == "loss":
            picture.unlink(missing_ok=True)  # of no loss none is drawn
            draw_loss_curve(run / "log.jsonl", picture)
        elif name in OF_HISTORY:
            history = _history(run)
            OF_HISTORY[name](history, _last_step(run, history)).savefig(picture, dpi=110)
        elif name == "gradients":
            draw_gradients(_gradients(run, base)).savefig(picture, dpi=110)
        else:
            draw_singular_vectors(_similarity(run, base, vectors)).savefig(picture, dpi=110)
        if not picture.exists():
            warnings.warn(f"{run / 'log.jsonl'} has no loss yet: no picture of it", stacklevel=3)
            continue
        print(picture, flush=True)
        drawn.append(picture)
    return drawn


def _history(run: Path) -> SubnetHistory:
    try:
        history = SubnetHistory.read(run / "subnets.jsonl")
    except (FileNotFoundError, ValueError) as error:
        raise InputError(str(error)) from None
    if not history.places:
        raise InputError(
            f"{run / 'subnets.jsonl'} holds no subnet: was the run interrupted at once?"
        )
    return history


def _last_step(run: Path, history: SubnetHistory) -> int:
    steps = [entry["step"] for entry in read_log(run / "log.jsonl")] + [
        place.step for place in history.places
    ]
    return max(1, *steps)


def _options(run: Path, base: str | None) -> FinetuneOptions:
    """The run's, with the base model where it is now."""
    options = read_options(run)
    if base is None and not os.path.exists(options.model) and os.path.isabs(options.model):
        raise InputError(
            f"{options.model}, the model before training, is no longer there: --base MODEL says where it is"
        )
    return replace(options, model=base or options.model)


def _gradients(run: Path, base: str | None) -> dict[str, tuple[Tensor, Tensor]]:
    options = _options(run, base)
    given = sft_config(options)
    tokenizer, model = load_tokenizer(options, given), load_model(options, given)
    samples = load_data(options, given, tokenizer).train
    if fingerprint(samples) != read_record(run).get("tokens_sha256", fingerprint(samples)):
        raise InputError(
            f"{options.data} no longer becomes the tokens that {run} was trained on, so its gradients would be of "
            f"other data"
        )
    filler = tokenizer.eos_token_id  # masks go by position
    collator = DataCollatorForLanguageModeling(filler, padding_free=options.packing)
    loader: DataLoader = DataLoader(samples, options.batch_size, collate_fn=collator)
    config = LoSiAConfig(
        rank_factor=options.rank_factor, output_dim_factor=options.output_dim_factor
    )
    return gradient_sums(model, list(islice(loader, GRADIENT_BATCHES)), config)


def _similarity(run: Path, base: str | None, vectors: int) -> dict[str, Tensor]:
    options = _options(run, base)
    if not (run / "model").exists():
        raise InputError(f"{run} is not finished: it has no model/ to compare with its base")
    try:
        before, after = (
            AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
            for folder in (options.model, run / "model")
        )
    except (OSError, ValueError) as error:
        raise InputError(str(error).strip().splitlines()[0]) from None
    layers = _history(run).of_layers()
    names = [name for name in layers if re.search(r"\.\d+\.", name)]  # not the vocabulary's
    return singular_vector_similarity(before, after, names, vectors)
