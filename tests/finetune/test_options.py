"""Options are declared once: what the command line parses is what they default to."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from losia_kernels.cli import command_parser, main
from losia_kernels.finetune.checks import check_options
from losia_kernels.finetune.options import FinetuneOptions, InputError, with_config

REQUIRED = {"model": "m", "data": "d", "output": "o"}


def parse(**options) -> FinetuneOptions:
    """What ``losia-kernels finetune --option value ...`` makes of the values, given as text."""
    flags = {f"--{name.replace('_', '-')}": value for name, value in options.items()}
    arguments = [part for flag in flags.items() for part in flag if part]
    values = vars(command_parser().parse_args(["finetune", *arguments]))
    del values["command"]
    return FinetuneOptions(**with_config(values))


def test_the_defaults_of_the_command_line_are_those_of_the_options():
    assert parse(**REQUIRED) == FinetuneOptions(**REQUIRED)


def test_every_option_can_be_given_and_has_the_type_of_its_field(tmp_path):
    (tmp_path / "run.yaml").write_text("neftune_noise_alpha: 5")
    given = {**REQUIRED, "config": str(tmp_path / "run.yaml")}
    for field in dataclasses.fields(FinetuneOptions):
        if "choices" in field.metadata["argument"]:
            given[field.name] = field.metadata["argument"]["choices"][-1]
        elif field.type is bool:
            given[field.name] = ""
        elif field.name not in given:
            given[field.name] = "7"
    # which others exclude
    excluded = {"group_by_length", "eval_fraction", "epochs"}
    for name in excluded:
        del given[name]
    for name, value in vars(parse(**given)).items():
        field = FinetuneOptions.__dataclass_fields__[name]
        kind = {int | None: int, str | None: str, dict[str, Any] | None: dict}.get(
            field.type, field.type
        )
        assert type(value) is (int if name == "period" else kind), name
        assert name in excluded or value != field.default, name


@pytest.mark.parametrize(
    ("options", "samples", "processes", "steps"),
    [
        ({"epochs": 1, "batch_size": 4}, 38, 1, 10),
        ({"epochs": 1, "batch_size": 4, "gradient_accumulation": 2}, 38, 1, 5),
        ({"epochs": 1.5, "batch_size": 4, "gradient_accumulation": 2}, 38, 1, 8),
        ({"epochs": 1, "batch_size": 4}, 38, 2, 5),
        ({"epochs": 1, "steps": 7}, 38, 2, 7),
        ({"epochs": 1, "batch_size": 4, "config": {"dataloader_drop_last": True}}, 38, 1, 9),
    ],
)
def test_the_steps_of_a_run(options, samples, processes, steps):
    assert FinetuneOptions(**REQUIRED, **options).total_steps(samples, processes) == steps


def test_a_last_batch_that_is_dropped_must_not_be_the_only_one():
    given = FinetuneOptions(**REQUIRED, steps=3, config={"dataloader_drop_last": True})
    assert given.total_steps(4) == 3
    with pytest.raises(InputError, match="dataloader_drop_last leaves nothing of 3 samples"):
        given.total_steps(3)


NAMES = [
    ("data", "", "data is empty"),
    ("output", " ", "output is empty"),
    ("data", "caf\udce9.jsonl", "data must be a name in UTF-8, got 'caf\\udce9.jsonl'"),
    ("output", "runs/\udce9", "output must be a name in UTF-8"),
    ("data", '{"prompt": "' + 300 * "x", "data: cannot look at {"),
    ("model", "~nobody-of-that-name/m", "model: cannot look at ~nobody"),
]


@pytest.mark.parametrize(("option", "name", "problem"), NAMES)
def test_names_that_cannot_be(capsys, option, name, problem):
    """Of what is no text, run.json would keep --resume from being read."""
    names = {"model": "m", "data": "d.jsonl", "output": "o", option: name}
    assert main(["finetune", *(part for key in names for part in (f"--{key}", names[key]))]) == 2
    assert problem in (said := capsys.readouterr().err) and said.count("\n") == 1


def test_a_place_that_may_not_be_looked_at(capsys, monkeypatch):
    def stat(self, **how):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "stat", stat)
    given = ["--model", "m", "--data", "d.jsonl", "--output", "o"]
    assert main(["finetune", *given]) == 2
    assert "model: cannot look at m: Permission denied\n" in capsys.readouterr().err


def test_names_may_be_paths():
    check_options(FinetuneOptions(**{name: Path(value) for name, value in REQUIRED.items()}))
