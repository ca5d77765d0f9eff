"""A hub that cannot be reached is told at once."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import constants

from losia_kernels.cli import main
from losia_kernels.finetune.hub import offline_if_unreachable
from tests.finetune.test_data import write


@pytest.fixture
def unreachable(monkeypatch):
    """No server; gives the seconds that were waited for one."""
    waited: list[float] = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://localhost:9")  # a closed port
    monkeypatch.setattr("time.sleep", waited.append)
    return waited


@pytest.mark.parametrize("what", ["model", "data", "estimate"])
def test_what_is_not_in_the_cache_is_said_without_more_attempts(
    unreachable, what, model_folder, tmp_path, capsys
):
    names = {"model": str(model_folder), "data": str(write(tmp_path / "d.jsonl", {"text": "a"}))}
    words = {
        "model": "cannot load the model nobody/nothing from the hub",
        "data": "cannot read nobody/nothing as a data set of the hub",
        "estimate": "no folder nobody/nothing, and its config.json is not to be had from the hub",
    }
    if what == "estimate":
        command = ["estimate", "--model", "nobody/nothing", "--memory", "24"]
    else:
        names[what] = "nobody/nothing"
        command = ["finetune", "--output", str(tmp_path / "run")]
        command += [word for name, value in names.items() for word in (f"--{name}", value)]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert words[what] in said and said.count("\n") == 1
    assert unreachable == []
    assert not (tmp_path / "run").exists() and constants.HF_HUB_OFFLINE is False


class Answers(BaseHTTPRequestHandler):
    def do_HEAD(self):  # noqa: N802
        self.send_response(404)
        self.end_headers()

    def log_message(self, *args):
        pass


def test_a_hub_that_answers_is_asked_on(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with HTTPServer(("localhost", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://localhost:{server.server_port}")
        with offline_if_unreachable():
            assert constants.HF_HUB_OFFLINE is False
        server.shutdown()
