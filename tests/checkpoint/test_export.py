"""The plain model of a checkpoint of a run, and what is said of it."""

import pytest
import torch
from safetensors.torch import load_file

from losia_kernels import cli
from losia_kernels.finetune.run import finetune
from tests.finetune.tiny_run import options

STEPS = 12


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, model_folder):
    folder = tmp_path_factory.mktemp("whole")
    finetune(options(folder, model_folder, steps=STEPS, save_steps=STEPS, eval_data=None))
    return folder / "run"


def test_export_is_the_model_at_that_step(whole_run, tmp_path):
    last = whole_run / "checkpoints" / f"checkpoint-{STEPS}"
    assert cli.main(["export", str(last), str(tmp_path / "exported")]) == 0
    exported, final = (
        load_file(f / "model.safetensors") for f in (tmp_path / "exported", whole_run / "model")
    )
    assert exported.keys() == final.keys() and all(
        torch.equal(exported[key], final[key]) for key in final
    )
    assert (tmp_path / "exported" / "tokenizer.json").exists()


def test_inspect_says_what_a_checkpoint_holds(whole_run, capsys):
    assert cli.main(["inspect", str(whole_run / "checkpoints" / "checkpoint-12")]) == 0
    printed = capsys.readouterr().out
    for line in (
        "step            12",
        "observing       model.layers.0",
        "groups          3, period 3, update async",
        "layers          15",
        "   1 x lm_head  weight 261 x 32  subnet 32 x 32",
        "   2 x model.layers.*.mlp.down_proj  weight 32 x 48  subnet 8 x 12",
    ):
        assert line in printed.splitlines(), printed
