"""Calls past the dispatcher are the same calls: nobody who listens is left out, and mutations are
seen."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from losia_kernels import ops
from losia_kernels.ops import gather
from losia_kernels.ops.registry import register

IDX = torch.tensor([0, 2])


class Listener(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.heard = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.heard.append(str(func))
        return func(*args, **(kwargs or {}))


@register("losia_test::overwrite_", mutates_args=("target",))
def overwrite_(source: torch.Tensor, target: torch.Tensor) -> None:
    target.data.copy_(source)  # as a raw launch: torch does not see it


@pytest.mark.parametrize("keywords", [False, True])
def test_a_direct_call_gives_mutated_arguments_a_new_version(keywords):
    source, target = torch.ones(2), torch.zeros(2)
    with torch.no_grad():
        overwrite_(source, target=target) if keywords else overwrite_(source, target)
    assert torch.equal(target, source) and target._version == 1 and source._version == 0


def test_without_autograd_the_dispatcher_is_passed_by_unless_somebody_listens(monkeypatch):
    called = []
    plain = gather.gather_features_plain
    monkeypatch.setattr(
        gather, "gather_features_plain", lambda x, idx: called.append(1) or plain(x, idx)
    )
    x = torch.randn(3, 4)
    with torch.no_grad(), torch.profiler.profile() as direct:
        ops.gather_features(x, IDX)
    with torch.profiler.profile() as recorded:
        ops.gather_features(x, IDX)
    names = [{event.key for event in run.key_averages()} for run in (direct, recorded)]
    assert (
        len(called) == 2
        and "losia::gather_features" not in names[0]
        and "losia::gather_features" in names[1]
    )


def test_a_dispatch_mode_hears_the_op():
    x = torch.randn(3, 4)
    with torch.no_grad(), Listener() as listener:
        ops.gather_features(x, IDX)
    assert listener.heard[0] == "losia.gather_features.default"


def test_fake_tensors_outside_their_mode_get_the_fake():
    with FakeTensorMode():
        x, idx = torch.empty(3, 4), torch.empty(2, dtype=torch.int64)
    with torch.no_grad():
        assert ops.gather_features(x, idx).shape == (3, 2)


def test_a_differentiable_call_is_refused_in_the_backward_and_not_silently_cut():
    x = torch.randn(3, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="losia::gather_features|losia.gather_features"):
        ops.gather_features(x, IDX).sum().backward()
