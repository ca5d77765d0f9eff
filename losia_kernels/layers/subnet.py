"""Subnet: which output and which input neurons of a linear are trained."""

from dataclasses import dataclass

import torch
from torch import Tensor


def subnet_size(factor: float, features: int, name: str, alignment: int = 1) -> int:
    """k = int(p * dim), the number of neurons a factor selects, in whole runs of ``alignment``
    unless it is all of them. Raises ValueError when that is none."""
    if not 0 < factor <= 1:
        raise ValueError(f"{name}: the rank factor must be in (0, 1], got {factor!r}")
    # 1/49 * 49 is 0.999...: rounding noise must not cost a neuron
    k = int(factor * features + 1e-9)
    if k < features:
        k -= k % alignment
    if k == 0:
        runs = f" in runs of {alignment}" if alignment > 1 else ""
        raise ValueError(
            f"{name}: a rank factor of {factor} selects none of {features} neurons{runs}; use at least "
            f"{min(alignment, features)}/{features}" + (" or a smaller alignment" if runs else "")
        )
    return k


def neurons_of_runs(runs: Tensor, alignment: int) -> Tensor:
    """The neurons of runs ``[k / alignment]``: run r is ``alignment`` neighbours, from ``r *
    alignment`` on."""
    if alignment == 1:
        return runs
    return (runs[:, None] * alignment + torch.arange(alignment, device=runs.device)).flatten()


def run_length(k: int, features: int, alignment: int) -> int:
    """Neighbours that are chosen together where ``k`` of ``features`` neurons are: a side taken
    whole has no runs."""
    return 1 if k == features else alignment


@dataclass(frozen=True)
class Subnet:
    """Output neurons ``out_idx [k_out]`` (the paper's Y_S) and input neurons ``in_idx [k_in]``
    (X_S), both int64, sorted, unique: the dense block ``weight[out_idx][:, in_idx]``.

    ``captured``: the block's share of the score it was selected by, a scalar tensor: NaN if
    that score is zero everywhere; None where no such score exists.
    """

    out_idx: Tensor
    in_idx: Tensor
    captured: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """``(k_out, k_in)``."""
        return self.out_idx.shape[0], self.in_idx.shape[0]

    @classmethod
    def random(
        cls,
        features: tuple[int, int],
        shape: tuple[int, int],
        generator: torch.Generator,
        alignment: int = 1,
    ) -> "Subnet":
        """Independent uniform choices of ``shape = (k_out, k_in)`` of ``features = (out, in)``
        neurons, on the CPU.

        ``alignment``: of runs of that many neighbours.
        """
        chosen = []
        for size, k in zip(features, shape, strict=True):
            run = run_length(k, size, alignment)
            runs = (
                torch.randperm(size // run, generator=generator, device="cpu")[: k // run]
                .sort()
                .values
            )
            chosen.append(neurons_of_runs(runs, run))
        return cls(*chosen)

    def check(self, features: tuple[int, int], name: str, alignment: int = 1) -> None:
        """Raise ValueError, naming the layer ``name``, unless both indices fit a weight of
        ``features = (out, in)``.

        With ``alignment`` also unless they are runs of that many neighbours, each from a multiple
        of it.

        Reads the values, so it waits for the GPU: for indices that come from outside, not for
        selected ones.
        """
        for side, idx, size in zip(
            ("out_idx", "in_idx"), (self.out_idx, self.in_idx), features, strict=True
        ):
            where = f"{name}: {side}"
            if not isinstance(idx, Tensor):
                raise ValueError(f"{where} must be a 1-D int64 tensor, got a {type(idx).__name__}")
            if idx.dim() != 1 or idx.dtype != torch.int64:
                raise ValueError(
                    f"{where} must be a 1-D int64 tensor, got {tuple(idx.shape)} {idx.dtype}"
                )
            if idx.numel() == 0:
                raise ValueError(f"{where} is empty; a subnet needs at least one neuron")
            low, high = int(idx.min()), int(idx.max())
            if low < 0 or high >= size:
                raise ValueError(f"{where} must be in [0, {size}), got values from {low} to {high}")
            if idx.numel() > 1 and not bool((idx[1:] > idx[:-1]).all()):
                raise ValueError(f"{where} must be sorted and without repeats")
            run = run_length(idx.numel(), size, alignment)
            if idx.numel() % run or not torch.equal(idx, neurons_of_runs(idx[::run] // run, run)):
                raise ValueError(
                    f"{where} must be runs of {run} neighbours, each from a multiple of {run}"
                )

    def gather(self, weight: Tensor) -> Tensor:
        """The block ``weight[out_idx][:, in_idx]``, ``[k_out, k_in]``, a copy."""
        return weight.index_select(0, self.out_idx).index_select(1, self.in_idx)

    def overlap(self, other: "Subnet") -> float:
        """Share of this subnet's weights that ``other`` holds too, 0 to 1."""
        out_share = torch.isin(self.out_idx, other.out_idx).double().mean()
        in_share = torch.isin(self.in_idx, other.in_idx).double().mean()
        return float(out_share * in_share)
