"""Algorithm 1: the core subnet of a score matrix, greedily, in both orders; the better one wins."""

import functools

import torch
from torch import Tensor

from .. import ops
from ..layers.module import SubnetModule
from ..layers.subnet import Subnet, neurons_of_runs, run_length
from ..parallel.ranks import Ranks, RowShard


def random_subnet(layer: SubnetModule, seed: int, step: int) -> Subnet:
    """New places for ``layer``'s subnet after ``step``, the same in every process."""
    generator = torch.Generator().manual_seed(seed_of(seed, layer.name, step))
    features = layer.out_features, layer.in_features
    k_out, k_in = layer.subnet.shape
    return Subnet.random(features, (k_out, k_in), generator, layer.alignment)


def seed_of(seed: int, layer_name: str, step: int) -> int:
    """31 bits that differ between layers and steps, the same in every process."""
    return _fnv(_named_seed(seed, layer_name), step)


@functools.cache
def _named_seed(seed: int, layer_name: str) -> int:
    return functools.reduce(_fnv, layer_name.encode(), seed)


def _fnv(value: int, part: int) -> int:
    return (value * 0x01000193 ^ part) & 0x7FFFFFFF


class NonFiniteScoreError(ValueError):
    """A score was NaN or infinite; the subnet was left where it was."""


def top_neurons(sums: Tensor, k: int, alignment: int = 1) -> Tensor:
    """Sorted indices of the ``k`` largest of ``sums``; of equal ones the first, so that every rank
    agrees.

    With ``alignment`` those of the runs of that many neighbours whose sums are largest; neurons
    past the last whole run are not chosen.
    """
    run = run_length(k, sums.numel(), alignment)
    of_runs = sums if run == 1 else sums[: sums.numel() // run * run].view(-1, run).sum(1)
    runs = torch.sort(of_runs, descending=True, stable=True).indices[: k // run].sort().values
    return neurons_of_runs(runs, run)


def check_finite(sums: Tensor) -> None:
    """Raise NonFiniteScoreError if any of the sums is not finite (waits for the GPU)."""
    bad = int((~torch.isfinite(sums)).sum())
    if bad:
        raise NonFiniteScoreError(f"importance is not finite for {bad} of {sums.numel()} neurons")


def select_from_importance(
    importance: Tensor,
    uncertainty: Tensor | None,
    k_out: int,
    k_in: int,
    rows: RowShard | None = None,
    alignment: int = 1,
) -> Subnet:
    """The subnet with the largest sum of the score ``importance * uncertainty`` (``[out, in]``),
    greedily, Eq. 7.

    ``in_then_out`` (the paper's Row2Column) takes the ``k_in`` inputs with the largest column sums,
    then the ``k_out`` outputs with the largest sums within them; ``out_then_in`` is the mirror. The
    larger block sum wins; on a tie the former. With ``alignment`` runs of that many neighbours take
    the place of single neurons.

    Args:
        rows: those of the score that both tensors hold; None: all.

    Raises:
        NonFiniteScoreError: a score is not finite.
    """
    rows = rows or RowShard(Ranks(), importance.shape[0])
    out_sums, in_sums = _marginals(importance, uncertainty, None, None, rows)  # [out], [in]
    check_finite(out_sums)
    out_first = top_neurons(out_sums, k_out, alignment)
    in_first = top_neurons(in_sums, k_in, alignment)
    out_within, in_within = _marginals(importance, uncertainty, out_first, in_first, rows)
    out_second = top_neurons(out_within, k_out, alignment)
    in_second = top_neurons(in_within, k_in, alignment)
    in_then_out_sum, out_then_in_sum = out_within[out_second].sum(), in_within[in_second].sum()
    in_then_out = in_then_out_sum >= out_then_in_sum
    return Subnet(
        torch.where(in_then_out, out_second, out_first),
        torch.where(in_then_out, in_first, in_second),
        captured=torch.maximum(in_then_out_sum, out_then_in_sum) / out_sums.sum(),
    )


def _marginals(
    importance: Tensor,
    uncertainty: Tensor | None,
    out_idx: Tensor | None,
    in_idx: Tensor | None,
    rows: RowShard,
) -> tuple[Tensor, Tensor]:
    """``ops.score_marginals`` of the whole score, whose rows may lie on several ranks: only sums
    are exchanged."""
    if out_idx is not None:
        _, out_idx = rows.find(out_idx)
    out_sums, in_sums = ops.score_marginals(importance, uncertainty, out_idx, in_idx)
    return rows.all_gather(out_sums), rows.all_reduce(in_sums)


def select_subnet(score: Tensor, k_out: int, k_in: int, alignment: int = 1) -> Subnet:
    """The greedy best of both orders of choosing from a score matrix (Algorithm 1).

    Args:
        score: ``[out, in]``, float32, bfloat16 or float64.
        k_out, k_in: how many outputs and inputs to choose.
        alignment: choose runs of that many neighbours by their summed score; 1 is the paper.

    Returns:
        The subnet, with its share of the score in ``captured``.

    Raises:
        ValueError: these sizes cannot be selected.
        NonFiniteScoreError: a score is not finite.
    """
    if score.dim() != 2:
        raise ValueError(f"select_subnet: score must be [out, in], got {tuple(score.shape)}")
    if not (1 <= k_out <= score.shape[0] and 1 <= k_in <= score.shape[1]):
        raise ValueError(
            f"select_subnet: cannot select {k_out} x {k_in} of {tuple(score.shape)} neurons"
        )
    for k, size in zip((k_out, k_in), score.shape, strict=True):
        if k % run_length(k, size, alignment):
            raise ValueError(
                f"select_subnet: {k} of {size} neurons are no whole number of runs of {alignment}"
            )
    return select_from_importance(score, None, k_out, k_in, alignment=alignment)


def select_from_marginals(
    out_sums: Tensor, in_sums: Tensor, k_out: int, k_in: int, alignment: int = 1
) -> Subnet:
    """The outputs and the inputs of largest summed importance, independently: no ``[out, in]``
    state is needed."""
    check_finite(out_sums)
    check_finite(in_sums)
    return Subnet(top_neurons(out_sums, k_out, alignment), top_neurons(in_sums, k_in, alignment))
