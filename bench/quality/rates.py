"""Is one learning rate right for every rank factor? Searches over the rate times the share of the values trained."""

from ..harness.markdown import table
from ..methods.study import TRAINED_SHARE
from .study import best_rate
from .tables import Results, title, trials_of
from .tasks import TASKS


def one_rate(results: Results) -> str:
    """Costs by the rate in full fine-tuning's terms: in a column all sizes should cost least together."""
    parts = []
    for task in TASKS:
        costs = {method: trials_of(results, task, method) for method in TRAINED_SHARE}
        rows = []
        for method, trials in costs.items():
            if len(trials) > 1:
                best = best_rate(trials)
                tried = (
                    f"{lr * TRAINED_SHARE[method]:.1e}: {trials[lr]:.3f}" for lr in sorted(trials)
                )
                rates = f"{best:.0e}", f"{best * TRAINED_SHARE[method]:.1e}"
                rows.append(
                    [title(method), f"1/{1 / TRAINED_SHARE[method]:.3g}", *rates, "; ".join(tried)]
                )
        if len(rows) > 2:
            head = ["trained", "share of the values", "best rate", "times the share"]
            head.append("rate times the share: nats a token on the search split")
            parts.append(f"{TASKS[task].title.capitalize()}:\n\n{table(head, rows)}")
    note = (
        "A subnet at random holds its share of the sum of |g|, so a step that is to lower the loss as much needs a "
        'larger rate by as much: the rate times the share is full fine-tuning\'s (`lr_of="full"`).'
    )
    return "\n\n".join([note, *parts]) if parts else ""
