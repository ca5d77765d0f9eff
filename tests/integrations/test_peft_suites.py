"""PEFT's own tests, which ``make test`` fetches with its sdist: all that do not contradict the
method pass on LoSiA."""

import re
from pathlib import Path

import pytest

peft = pytest.importorskip("peft")

from tests.integrations import peft_suite  # noqa: E402

ROOT = Path(__file__).parents[2]
PEFT_TESTS = ROOT / ".cache" / f"peft-{peft.__version__}" / "tests"
# how many tests of each LoSiA had when this was written: none may be lost
AT_LEAST = {
    "test_custom_models": 400,
    "test_decoder_models": 150,
    "test_encoder_decoder_models": 40,
    "test_seq_classifier": 30,
}


@pytest.mark.slow
@pytest.mark.skipif(not PEFT_TESTS.exists(), reason=f"make {PEFT_TESTS.parent.relative_to(ROOT)}")
@pytest.mark.parametrize("suite", peft_suite.SUITES)
def test_pefts_own_tests_pass(suite, capfd):
    code = peft_suite.main(PEFT_TESTS, suite, "--tb=short")
    said = capfd.readouterr().out
    assert code == 0, said[-3000:]
    passed = re.search(r"(\d+) passed", said)
    assert passed and int(passed[1]) >= AT_LEAST[suite], said[-500:]


def test_the_reasons_are_in_the_documents():
    page = " ".join((ROOT / "docs" / "peft.md").read_text().split())
    for name, reason in peft_suite.CONTRADICTING.items():
        assert f"`{name}`" in page, f"{name} is left out without a word: {reason}"
