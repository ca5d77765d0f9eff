"""Oracle of the score (Eq. 6) and its sums: any input dtype, float64 inside and out."""

from torch import Tensor

from .subnet_grad import cut


def score_ref(importance: Tensor, uncertainty: Tensor | None = None) -> Tensor:
    """Eq. 6, s = I bar * U bar; the importance alone where there is no uncertainty."""
    return (
        importance.double() if uncertainty is None else importance.double() * uncertainty.double()
    )


def score_marginals_ref(
    importance: Tensor,
    uncertainty: Tensor | None = None,
    out_idx: Tensor | None = None,
    in_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sums of s per output over ``in_idx`` only ``[out]``, and per input over ``out_idx`` only
    ``[in]``."""
    score = score_ref(importance, uncertainty)
    return cut(score, None, in_idx).sum(dim=1), cut(score, out_idx, None).sum(dim=0)
