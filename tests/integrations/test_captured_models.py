"""Models of transformers inside CapturedBackward: nothing in their forward waits for the GPU."""

from unittest import mock

import pytest
import torch

from losia_kernels import CapturedBackward, LoSiAAdamW, LoSiAConfig, apply_losia
from tests.integrations.tiny_models import FAMILIES
from tests.training.fake_graphs import graphs

__all__ = ["graphs"]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2"])
def test_a_model_is_captured_once_and_trains_as_without_a_graph(graphs, family, padded):  # noqa: F811
    runs, losses = [], []
    for captured in (True, False):
        model = FAMILIES[family].make()
        model.config.use_cache = False
        apply_losia(model, LoSiAConfig(rank_factor=1 / 2, period=2))
        optimizer = LoSiAAdamW(model, lr=1e-3)
        backward = CapturedBackward(lambda batch, model=model: model(**batch).loss, optimizer)
        torch.manual_seed(0)
        for seed in range(5):
            batch = dict(FAMILIES[family].batch(seed))
            batch.pop("attention_mask", None)
            if padded:  # a mask of ones is dropped without a graph, and kept in one
                batch["attention_mask"] = torch.ones_like(batch["input_ids"])
                batch["attention_mask"][0, -2:] = 0
            if captured:
                losses.append(backward(batch))
            else:
                with mock.patch("torch.cuda.is_current_stream_capturing", lambda: True):
                    loss = model(**batch).loss  # with the mask that transformers makes in a capture
                loss.backward()
                losses.append(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
        runs.append(model.state_dict())
    assert len(graphs) == 1 and graphs[0].replays == 5
    assert losses[:5] == losses[5:]
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name
