"""Choosing the core subnet (Eq. 7): the greedy Algorithm 1, its simpler forms, and the exact
optimum of small matrices.

``score`` is ``[out, in]``; results are sorted index lists. Of equal sums the lower index is taken,
and of two equal blocks that of ``in_then_out``.
"""

from itertools import combinations

import numpy as np


def largest(sums, k: int, alignment: int = 1) -> list[int]:
    """The indices of the ``k`` largest sums, sorted; of equal ones the lower index.

    ``alignment`` > 1: neurons come in runs, ``alignment`` neighbours from each multiple of it, and
    a run's sum decides; what is left past the last whole run is never taken. Where all neurons are
    taken there is nothing to choose.
    """
    sums = [float(s) for s in sums]
    if k == len(sums):
        return list(range(k))
    runs = [
        range(first, first + alignment) for first in range(0, len(sums) - alignment + 1, alignment)
    ]
    best_first = sorted(runs, key=lambda run: (-sum(sums[i] for i in run), run[0]))
    return sorted(i for run in best_first[: k // alignment] for i in run)


def block_sum(score, out_idx, in_idx) -> float:
    """What Eq. 7 maximizes: the score inside the subnet."""
    return sum(float(score[i, j]) for i in out_idx for j in in_idx)


def in_then_out(score, k_out: int, k_in: int, alignment: int = 1) -> tuple[list[int], list[int]]:
    """Algorithm 1, Row2Column (the paper's rows are inputs): inputs by their whole sums, outputs
    within those."""
    n_out, n_in = score.shape
    in_idx = largest(
        [sum(float(score[i, j]) for i in range(n_out)) for j in range(n_in)], k_in, alignment
    )
    out_idx = largest(
        [sum(float(score[i, j]) for j in in_idx) for i in range(n_out)], k_out, alignment
    )
    return out_idx, in_idx


def out_then_in(score, k_out: int, k_in: int, alignment: int = 1) -> tuple[list[int], list[int]]:
    """Algorithm 1, Column2Row: the mirror."""
    n_out, n_in = score.shape
    out_idx = largest(
        [sum(float(score[i, j]) for j in range(n_in)) for i in range(n_out)], k_out, alignment
    )
    in_idx = largest(
        [sum(float(score[i, j]) for i in out_idx) for j in range(n_in)], k_in, alignment
    )
    return out_idx, in_idx


def select_ref(score, k_out: int, k_in: int, alignment: int = 1) -> tuple[list[int], list[int]]:
    """Algorithm 1: the better of the two orders."""
    score = np.asarray(score, dtype=np.float64)
    first, second = (order(score, k_out, k_in, alignment) for order in (in_then_out, out_then_in))
    return second if block_sum(score, *second) > block_sum(score, *first) else first


def select_outputs_ref(score, k_out: int, alignment: int = 1) -> list[int]:
    """Output layer (section 3.2): all inputs belong to the subnet, only outputs are chosen."""
    return largest(np.asarray(score, dtype=np.float64).sum(axis=1), k_out, alignment)


def select_marginal_ref(
    out_sums, in_sums, k_out: int, k_in: int, alignment: int = 1
) -> tuple[list[int], list[int]]:
    """From the sums alone (importance "marginal"): outputs and inputs independently of each
    other."""
    return largest(out_sums, k_out, alignment), largest(in_sums, k_in, alignment)


def brute_force_ref(score, k_out: int, k_in: int) -> tuple[list[int], list[int]]:
    """The optimum of Eq. 7, by trying every subnet; NP-hard (A.1.3), so for small matrices only."""
    score = np.asarray(score, dtype=np.float64)
    n_out, n_in = score.shape
    every = (
        (o, i) for o in combinations(range(n_out), k_out) for i in combinations(range(n_in), k_in)
    )
    out_idx, in_idx = max(every, key=lambda subnet: score[np.ix_(*subnet)].sum())
    return list(out_idx), list(in_idx)
