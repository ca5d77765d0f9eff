"""PEFT's own tests on LoSiA: ``python tests/integrations/peft_suite.py PEFT_TESTS [pytest options]``

PEFT_TESTS is the folder ``tests`` of a PEFT checkout, or of its sdist, at the installed version
(docs/peft.md). This file is a pytest plugin, too: it adds LoSiA to the lists that PEFT's tests are
parametrized with, wherever they have SHiRA, and leaves only the tests of LoSiA.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SUITES = (
    "test_custom_models",
    "test_decoder_models",
    "test_encoder_decoder_models",
    "test_seq_classifier",
)
LINEARS = [["lin0"], ["lin1"], ["lin0", "lin1"]]
CASES = [
    ("LoSiA 1", "MLP", {"target_modules": "lin0"}),
    *(
        (f"LoSiA {number}", "MLP", {"target_modules": names})
        for number, names in enumerate(LINEARS, start=2)
    ),
    ("LoSiA 5", "MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    (
        "LoSiA 6",
        "MLP",
        {"target_modules": "all-linear", "rank_pattern": {"lin1": 1.0}, "rank_factor": 0.25},
    ),
    ("LoSiA 7", "EmbConv1D", {"target_modules": ["lin0"]}),
    ("LoSiA 8", "Conv2d", {"target_modules": ["lin0"]}),
]
SMALL = {"rank_factor": 0.5, "period": 1}  # the modules have 2 to 20 neurons
MODEL = {"rank_factor": 0.5, "period": 1, "init_weights": False}  # of few ReLUs all may be dead
ACTIVE = ("LoSiA Different", "losia", {"target_modules": ["lin0"]}, {"target_modules": ["lin1"]})

TWO_ACTIVE = "makes two adapters of one layer active at once, which LoSiA refuses"
# Tests whose expectation contradicts the method, by name, and why.
CONTRADICTING = {
    "test_active_adapter": TWO_ACTIVE,
    "test_multiple_active_adapters_with_same_modules_to_save_raises": f"{TWO_ACTIVE}, with another message",
    "test_multiple_active_adapters_with_overlapping_modules_to_save_raises": f"{TWO_ACTIVE}, with another message",
    "test_multiple_active_adapters_with_different_modules_to_save_works": TWO_ACTIVE,
    "test_merge_layers_multi": "merges two adapters of one layer at once, which LoSiA refuses",
    "test_only_params_are_updated": "wants base_layer.weight untouched by training; LoSiA trains it in place",
    "test_get_base_model_state_dict": "wants the base's weights while an adapter is in them; LoSiA gives them while it "
    "is disabled (tests/integrations/test_peft.py)",
}


def pytest_configure(config):
    import losia_kernels.integrations.peft  # noqa: F401  registers the method


def pytest_generate_tests(metafunc):
    from losia_kernels.integrations.peft import LoSiAPeftConfig

    module = metafunc.module
    if not hasattr(module, "ShiraConfig"):
        return
    cases = getattr(module, "TEST_CASES", None)
    if cases is not None and not any(case[2] is LoSiAPeftConfig for case in cases):
        cases += [
            (name, model, LoSiAPeftConfig, {**SMALL, **kwargs}) for name, model, kwargs in CASES
        ]
        name, method, first, second = ACTIVE
        init = {**SMALL, "init_weights": False}
        module.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES.append(
            (name, method, LoSiAPeftConfig, {**init, **first}, {**init, **second})
        )
    for mark in metafunc.definition.iter_markers("parametrize"):
        values = mark.args[1]
        if module.ShiraConfig in values and LoSiAPeftConfig not in values:
            values.append(LoSiAPeftConfig)
        pairs = [value for value in values if isinstance(value, tuple) and len(value) == 2]
        ours = [options for method, options in pairs if method is module.ShiraConfig]
        if ours and not any(method is LoSiAPeftConfig for method, _ in pairs):
            task = ours[0]["task_type"]
            values.append((LoSiAPeftConfig, {**MODEL, "task_type": task}))


def pytest_collection_modifyitems(config, items):
    ours = [item for item in items if "LoSiA" in item.name]
    kept = [item for item in ours if item.originalname not in CONTRADICTING]
    dropped = sorted({item.originalname for item in ours} - {item.originalname for item in kept})
    for name in dropped:
        print(f"deselected {name}: {CONTRADICTING[name]}")
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


def main(folder: Path, *arguments: str) -> int:
    here = Path(__file__).resolve().parent
    sys.path.insert(0, str(here.parents[1]))
    from tests.integrations.peft_models import make_models

    suites = [name for name in SUITES if name in arguments] or SUITES
    options = [argument for argument in arguments if argument not in SUITES]
    with tempfile.TemporaryDirectory() as scratch:
        # an sdist lacks the __init__.py that their relative imports need
        package = Path(scratch) / "peft_tests"
        package.mkdir()
        (package / "__init__.py").touch()
        for file in folder.glob("test*.py"):
            shutil.copy(file, package)
        make_models(Path(scratch))
        if importlib.util.find_spec("diffusers") is None:  # they import it, for other tests
            (Path(scratch) / "diffusers.py").write_text(
                "class StableDiffusionPipeline:\n    pass\n"
            )
        path = os.pathsep.join([str(here.parents[1]), scratch, os.environ.get("PYTHONPATH", "")])
        command = [
            sys.executable,
            *("-m", "pytest", "-p", "tests.integrations.peft_suite", "-p", "no:cacheprovider"),
            *("-c", os.devnull, "--rootdir", scratch, "-q", "--disable-warnings"),
            *(str(package / f"{name}.py") for name in suites),
            *options,
        ]
        offline = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
        return subprocess.call(command, cwd=scratch, env={**os.environ, **offline})


if __name__ == "__main__":
    if len(sys.argv) < 2 or not (Path(sys.argv[1]) / "test_custom_models.py").exists():
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
