"""What LoSiA says in each of DeepSpeed's stages, one JSON line each: ``python -m
tests.parallel.deepspeed_engines``. One process on a CPU; needs deepspeed."""

import json
import os
import sys
import tempfile

import deepspeed
import torch

from losia_kernels import LoSiAAdamW, apply_losia
from tests.integrations.paper_adapter import paper_adapter
from tests.integrations.tiny_llama import make_model
from tests.tiny import paper

CONFIG = paper(rank_factor=0.25, period=1)
IDS = torch.arange(14).view(2, 7)


def engine_config(stage: int) -> dict:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def initialized(stage: int) -> str:
    """The optimizer goes into the engine."""
    model = apply_losia(make_model(), CONFIG)
    optimizer = LoSiAAdamW(model, lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=engine_config(stage))
    for _ in range(3):
        engine.backward(engine(input_ids=IDS, labels=IDS).loss)
        engine.step()
    return f"trained {optimizer.timeline.step} steps"


def made_after(stage: int) -> str:
    """The optimizer is made of the engine."""
    model = apply_losia(make_model(), CONFIG)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(trained), config=engine_config(stage)
    )
    LoSiAAdamW(engine, lr=1e-3)
    return "made"


def partitioned(stage: int, peft: bool) -> str:
    """The model is partitioned first, as transformers does under ZeRO-3."""
    with deepspeed.zero.Init(config_dict_or_path=engine_config(stage)):
        model = make_model(pad_token_id=None)
    if not peft:
        apply_losia(model, CONFIG)
        return "converted"
    from peft import get_peft_model

    get_peft_model(model, paper_adapter(rank_factor=0.25))
    return "converted"


def in_trainer(stage: int) -> str:
    from transformers import Trainer, TrainingArguments

    from losia_kernels.integrations.transformers import LoSiACallback

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, use_cpu=True, deepspeed=engine_config(stage))
        trainer = Trainer(apply_losia(make_model(), CONFIG), arguments, train_dataset=[])
        LoSiACallback(trainer)
    return "added"


def main() -> None:
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    deepspeed.init_distributed(dist_backend="gloo")
    cases = [("initialized", initialized, (stage,)) for stage in range(4)]
    cases += [("made_after", made_after, (stage,)) for stage in range(1, 4)]
    cases += [("partitioned", partitioned, (3, peft)) for peft in (False, True)]
    cases += [("in_trainer", in_trainer, (2,))]
    for name, case, arguments in cases:
        try:
            said = case(*arguments)
        except (ValueError, RuntimeError) as error:
            said = str(error)
        print(json.dumps([name, arguments[0], said]), file=sys.stderr)


if __name__ == "__main__":
    main()
