"""What stands beside the finished model: a card that says how it came about; its way to the hub."""

from importlib.metadata import version
from pathlib import Path

from huggingface_hub import HfApi, ModelCardData
from transformers import Trainer
from trl import SFTConfig

from .. import __version__
from ..integrations.transformers import losia_timeline
from .options import FinetuneOptions, InputError
from .rows import is_local

LIBRARIES = ("torch", "transformers", "trl", "datasets")


def model_card(options: FinetuneOptions, record: dict, trainer: Trainer) -> str:
    """The README.md of the finished model: method, data, losses, versions, how to load it.

    ``record``: what ``run.json`` holds.
    """
    on_hub = not Path(options.model).expanduser().exists()
    data_on_hub = not is_local(options.data)
    base = options.model if on_hub else f"{Path(record['model']).name}, a local folder"
    name = Path(options.output).resolve().name
    head = ModelCardData(
        base_model=options.model if on_hub else None,
        datasets=[options.data] if data_on_hub else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["losia", "sft", "trl"],
    ).to_yaml()
    history = trainer.state.log_history
    period = losia_timeline(trainer.optimizer).config.period
    state, best = trainer.state, best_step(trainer)
    losses = [entry["loss"] for entry in history if "loss" in entry]
    evaluated = [entry for entry in history if "eval_loss" in entry]
    if best:  # the losses are to be of the model that the card is of
        losses = [e["loss"] for e in history if "loss" in e and e["step"] <= best]
        evaluated = [entry for entry in evaluated if entry["step"] == best]
    of_best = f"; this is step {best}, the best by {trainer.args.metric_for_best_model}"
    rows = [
        ("base model", base),
        ("method", "LoSiA (arXiv 2507.04487): a moving dense block of every linear layer"),
        ("rank factor p", f"{options.rank_factor:g}, {options.shape}"),
        ("first subnets", options.init_subnet),
        ("moves", options.moves),
        ("of the vocabulary", f"{options.output_dim_factor:g}"),
        ("period", f"{period} steps"),
        (
            "steps",
            f"{state.global_step} of {options.batch_size} x {options.gradient_accumulation} samples"
            + (of_best if best else ""),
        ),
        ("learning rate", f"{options.lr:g}, {options.lr_scheduler}"),
        ("data", Path(options.data).name if not data_on_hub else options.data),
        ("data, sha256", record["data_sha256"] or ""),
        ("tokens and labels, sha256", record["tokens_sha256"]),
    ]
    if losses:
        last = losses[-max(1, len(losses) // 10) :]
        rows.append(
            ("training loss, last tenth", f"{sum(last) / len(last):.4f} nats per learned token")
        )
    if evaluated:
        last_one = evaluated[-1]
        rows.append(("evaluation loss", f"{last_one['eval_loss']:.4f} nats per learned token"))
        rows.append(
            (
                "evaluation accuracy",
                f"{100 * last_one['eval_mean_token_accuracy']:.1f} % of learned tokens",
            )
        )
    rows.append(
        (
            "made with",
            ", ".join([f"losia_kernels {__version__}", *(f"{n} {version(n)}" for n in LIBRARIES)]),
        )
    )
    table = "\n".join(f"| {key} | {value} |" for key, value in rows if value != "")
    return f"""---
{head}
---

# {name}

{Path(record["model"]).name}, fine-tuned with [losia_kernels](https://arxiv.org/abs/2507.04487). The architecture is the
base model's; nothing has to be merged, and nothing but transformers is needed to load it.

| | |
| --- | --- |
{table}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")  # the folder with this file, or its name on the hub
tokenizer = AutoTokenizer.from_pretrained("{name}")
```
"""


def best_step(trainer: Trainer) -> int | None:
    """The step whose model was taken at the end, if that is not the last."""
    taken = trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint
    return int(Path(taken).name.rpartition("-")[2]) if taken else None


def check_push(config: SFTConfig) -> None:
    """Raises InputError, before the run, if its model could not be pushed to the hub after it."""
    if not config.push_to_hub:
        return
    try:
        HfApi(token=config.hub_token).whoami()
    except Exception as error:  # of the network, or of the hub
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"push_to_hub: the hub does not know you: {reason}") from None


def push_to_hub(folder: Path, config: SFTConfig) -> None:
    """Push the finished model, if ``push_to_hub`` was asked for, with TRL's ``hub_*`` fields."""
    if not config.push_to_hub:
        return
    api = HfApi(token=config.hub_token)
    name = config.hub_model_id or folder.resolve().parent.name
    repository = api.create_repo(name, private=config.hub_private_repo, exist_ok=True)
    if config.hub_revision:
        api.create_branch(repository.repo_id, branch=config.hub_revision, exist_ok=True)
    api.upload_folder(
        repo_id=repository.repo_id,
        folder_path=folder,
        revision=config.hub_revision,
        commit_message="Fine-tuned with LoSiA",
    )
    print(f"pushed to {repository}")
