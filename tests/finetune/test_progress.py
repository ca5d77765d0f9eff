"""What a run says while it trains."""

import math
import time
from statistics import fmean

import pytest
from transformers import TrainerCallback

from losia_kernels.checkpoint.folder import MARKER
from losia_kernels.finetune import progress
from losia_kernels.finetune.progress import moving_average
from losia_kernels.finetune.run import finetune
from tests.finetune.tiny_run import options
from tests.integrations.tiny_llama import make_model, make_tokenizer


def test_the_terminal_says_what_runs_and_how_far_it_is(tmp_path, model_folder, capsys):
    chosen = {
        "steps": 8,
        "period": "auto",
        "output_dim_factor": 0.0,
        "save_steps": 0,
        "eval_data": None,
    }
    finetune(options(tmp_path, model_folder, **chosen))
    printed = capsys.readouterr().out
    assert "14 layers in 2 groups" in printed and "period 2 steps (auto), 2.0 cycles" in printed
    assert (
        "38 samples" in printed
        and "8 steps of 4 x 2 samples, lr 0.01 cosine, 1 steps of warm-up" in printed
    )
    lines = [line for line in printed.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["4/8", "8/8"]
    for part in ("loss ", "lr ", " tokens/s ", " GiB ", "left 0:00:0", "observing model.layers.1"):
        assert part in lines[0], lines
    assert not (tmp_path / "run" / "checkpoints").exists() or not list(
        (tmp_path / "run" / "checkpoints").iterdir()
    )


def test_of_a_rate_of_full_fine_tuning_it_says_what_the_subnets_have(
    tmp_path, model_folder, capsys
):
    chosen = {"steps": 2, "save_steps": 0, "eval_data": None, "output_dim_factor": 0.0, "lr": 1e-3}
    drawn = {"init_subnet": "random", "moves": "none"}
    finetune(options(tmp_path, model_folder, **chosen, **drawn))
    printed = capsys.readouterr().out
    assert "lr 0.001 (0.016 of the subnets) cosine" in printed  # p is 1/4
    assert "no moves" in printed and "observing" not in printed


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    model = make_model()
    model.model.norm.weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1"):
        finetune(options(tmp_path, tmp_path / "model", init_subnet="random"))
    assert not (tmp_path / "run" / "model").exists()


def test_the_loss_curve_of_a_long_run_takes_no_longer_than_its_steps():
    """It is drawn at every checkpoint, and a sum over each window of 150,000 steps would take half
    a minute."""
    values = [math.sin(step) for step in range(150_000)]
    started = time.process_time()
    smooth = moving_average(values, 15_000)
    assert time.process_time() - started < 3
    for last in (0, 1, 14_999, 15_000, 149_999):
        assert smooth[last] == pytest.approx(
            fmean(values[max(0, last - 14_999) : last + 1]), abs=1e-12
        )
    assert moving_average([3.0, 5.0], 1) == [3.0, 5.0]


def test_a_picture_that_cannot_be_drawn_ends_no_run_and_costs_no_checkpoint(tmp_path, model_folder):
    class Obstacle(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            (tmp_path / "run" / "loss_curve.png").mkdir(exist_ok=True)

    given = options(tmp_path, model_folder, steps=4, save_steps=2, eval_data=None)
    with pytest.warns(UserWarning, match="cannot draw .*loss_curve.png: .*Is a directory"):
        finetune(given, (Obstacle(),))
    assert (tmp_path / "run" / "model").exists()
    assert len(list((tmp_path / "run" / "checkpoints").glob(f"*/{MARKER}"))) == 2


def test_a_checkpoint_is_whole_before_its_picture_is_drawn(tmp_path, model_folder, monkeypatch):
    whole = []

    def draw(log, picture):
        whole.append([path.parent.name for path in log.parent.glob(f"checkpoints/*/{MARKER}")])

    monkeypatch.setattr(progress, "draw_loss_curve", draw)
    finetune(options(tmp_path, model_folder, steps=2, save_steps=2, eval_data=None))
    assert whole[0] == ["checkpoint-2"]
