"""As in ``tests/integrations``: these tests need the extra ``hf`` and stay on the CPU."""

import resource

import pytest

from losia_kernels import cli
from losia_kernels.checkpoint.delta import make_delta
from tests.integrations.conftest import model_folder, tokenizer, without_a_gpu  # noqa: F401


@pytest.fixture
def made(pair, tmp_path):
    """The delta between the models that the file's ``pair`` has."""
    make_delta(pair.base, pair.trained, tmp_path / "delta")
    return tmp_path / "delta"


@pytest.fixture
def outside(tmp_path):
    """A file that nothing may read from or write to; it is looked at afterwards."""
    path = tmp_path / "outside"
    path.write_text("precious")
    yield path
    assert path.read_text() == "precious" and not path.is_symlink()


@pytest.fixture
def refused(capsys):
    """Runs a command that must end in one line with this text and exit code 2."""

    def run(*arguments, problem: str) -> None:
        assert cli.main([str(each) for each in arguments]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("losia-kernels: ") and printed.count("\n") == 1, printed
        assert problem in printed, printed

    return run


@pytest.fixture
def little_memory():
    """What would take 74 GiB fails at once instead of taking the machine down."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (24 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)
