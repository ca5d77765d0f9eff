"""Markdown tables of one result file. Pure functions of its contents, so that they can be made
again, byte by byte."""

from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any

from . import paper
from .methods import METHODS
from .methods.galore import GAP
from .models import BUDGETS_GB, CONFIGS

Rows = list[dict[str, Any]]
HAVE_SLOTS = (
    "losia-pro",
    "losia-dense",
    "losia-reference",
)  # at layer level each has a second row, outside its slot


def _select(rows: Rows, suite: str, name: str | None = None, **fields: Any) -> Rows:
    """Rows of a suite whose id has these fields, in the methods' order."""
    found = [
        row
        for row in rows
        if row["id"]["suite"] == suite
        and name in (None, row["id"]["name"])
        and all(row["id"].get(key) == value for key, value in fields.items())
    ]
    order = list(METHODS)
    return sorted(
        found,
        key=lambda row: (
            order.index(row["id"]["name"]) if row["id"]["name"] in order else len(order)
        ),
    )


def _values(rows: Rows, suite: str, field: str) -> list[Any]:
    """The values of a field of the ids, as they come."""
    return list(
        dict.fromkeys(
            row["id"][field] for row in rows if row["id"]["suite"] == suite and field in row["id"]
        )
    )


def _table(head: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *map(list, body)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _title(name: str) -> str:
    return METHODS[name].title if name in METHODS else name


def _number(value: float, digits: int = 4) -> str:
    """``digits`` significant ones, no exponent."""
    if value == 0:
        return "0"
    text = f"{value:.{digits}g}"
    return f"{float(text):.0f}" if "e" in text or float(text) >= 10 ** (digits - 1) else text


def _mib(value: int) -> str:
    return _number(value / 2**20)


def _gb(value: int | None) -> str:
    return "" if value is None else f"{value / 1e9:.2f}"


def _millions(value: int) -> str:
    return f"{value / 1e6:.1f}"


def _why_not(row: dict[str, Any]) -> str:
    if row["status"] == "oom":
        return f"out of memory ({_gb(row['bytes_asked_for'])} GB asked for)"
    return {"missing": "not run", "red": "wrong result", "failed": "failed"}[row["status"]]


def _no_figures(row: dict[str, Any], columns: int) -> list[str]:
    return [_why_not(row)] + [""] * (columns - 1)


# one function a table -----------------------------------------------------------------------------


def layer(rows: Rows) -> str:
    """Every stack of every model: times as ratios to the frozen floor of the same job."""
    parts = []
    for model in _values(rows, "layer", "model"):
        for stack in ("linears", "block"):
            chosen = _select(rows, "layer", model=model, stack=stack)
            if chosen:
                first = chosen[0]["id"]
                what = "a decoder layer" if stack == "block" else "a decoder layer's linears"
                parts.append(
                    f"{what} of {model}, {first['batch']} x {first['context']} tokens, {first['dtype']}\n\n"
                    + _layer_table(chosen, model, _svd_of(rows, model))
                )
    return "\n\n".join(parts)


def _layer_table(chosen: Rows, model: str, svd: dict[str, Any] | None) -> str:
    head = (
        "method",
        "over the floor",
        "ms (20-80 %)",
        "forward",
        "backward",
        "update",
        "saved MiB",
        "peak MiB",
        "trained M",
    )
    body = []
    by_name = {row["id"]["name"]: row for row in chosen}
    for name, row in by_name.items():
        if (
            name.removesuffix("-off") in HAVE_SLOTS
            and name.endswith("-off")
            and name.removesuffix("-off") in by_name
        ):
            continue  # stands with the row of the method in its slot
        off = by_name.get(f"{name}-off")
        if off is not None and row["status"] == off["status"] == "ok":
            layers = CONFIGS[model]["num_hidden_layers"]
            mean = ((layers - 1) * _over_floor(off) + _over_floor(row)) / layers
            body.append(
                [f"{_title(name)}, mean of {layers} layers", f"{mean:.3f}"] + [""] * (len(head) - 2)
            )
        title = _title(name) + (", in its slot" if name in HAVE_SLOTS else "")
        body.append([title, *_layer_cells(row, len(head) - 1)])
        if off is not None:
            body.append([_title(f"{name}-off"), *_layer_cells(off, len(head) - 1)])
        if name == "galore" and svd is not None and row["status"] == svd["status"] == "ok":
            extra = svd["total"]["ms"] / GAP
            cells = [
                f"{(row['total']['ms'] + extra) / row['floor_ms']:.3f}",
                _number(row["total"]["ms"] + extra),
                "",
                "",
                _number(row["update"]["ms"] + extra),
                "",
                "",
                "",
            ]
            body.append([f"{_title(name)}, with its SVD", *cells])
    return _table(head, body)


def _layer_cells(row: dict[str, Any], columns: int) -> list[str]:
    if row["status"] != "ok":
        return _no_figures(row, columns)
    phases = [_number(row[phase]["ms"]) for phase in ("forward", "backward", "update")]
    return [
        f"{_over_floor(row):.3f}",
        _with_spread(row["total"]),
        *phases,
        _mib(row["saved_bytes"]),
        _mib(row["peak_bytes"]),
        _millions(row["trained"]),
    ]


def _over_floor(row: dict[str, Any]) -> float:
    return row["total"]["ms"] / row["floor_ms"]


def _with_spread(timing: dict[str, Any], scale: float = 1.0) -> str:
    ms, low, high = (_number(scale * timing[key]) for key in ("ms", "low", "high"))
    return f"{ms} ({low}-{high})"


def _svd_of(rows: Rows, model: str) -> dict[str, Any] | None:
    return next(iter(_select(rows, "layer", "galore-svd", model=model)), None)


def model(rows: Rows) -> str:
    """Table 15: microseconds a token, with and without gradient checkpointing, the paper's beside
    ours."""
    parts = []
    for name in _values(rows, "model", "model"):
        for checkpointing in (True, False):
            chosen = [
                row
                for row in _select(
                    rows, "model", model=name, checkpointing=checkpointing, batch=_batch(rows)
                )
                if _is_default(row)
            ]
            if chosen:
                first = chosen[0]["id"]
                size = f"{name}, {first['batch']} x {first['context']} tokens, {first['dtype']}"
                how = f"{'with' if checkpointing else 'without'} gradient checkpointing"
                parts.append(
                    f"{size}, {how}, us a token\n\n"
                    f"{_model_table(chosen, name, checkpointing, _svd_of(rows, name))}"
                )
    return "\n\n".join(parts)


def _batch(rows: Rows) -> int:
    return 4 if 4 in _values(rows, "model", "batch") else 1


def _is_default(row: dict[str, Any]) -> bool:
    found = row["id"]
    return (
        found.get("rank_factor", 1 / 8) == 1 / 8
        and found.get("output_dim_factor", 0.0) == 0.0
        and found.get("rank", 64) == 64
    )


def _model_table(chosen: Rows, name: str, checkpointing: bool, svd: dict[str, Any] | None) -> str:
    compared = name == "llama-2-7b"
    gpu = any("predicted_bytes" in row for row in chosen)
    memory = ["peak GB", "predicted GB"] if gpu else ["peak GB above start"]
    head = ["method", "forward", "backward", "other", "total (20-80 %)", *memory, "trained M"]
    head += (
        ["paper, A800: forward / backward / total" if checkpointing else "paper, A800: total"]
        if compared
        else []
    )
    theirs = paper.CHECKPOINTED if checkpointing else paper.NOT_CHECKPOINTED
    body = []
    for row in chosen:
        method = row["id"]["name"]
        if row["status"] == "ok":
            times = [
                _number(row["us_per_token"][phase]) for phase in ("forward", "backward", "other")
            ]
            total = _with_spread(row["total"], row["us_per_token"]["total"] / row["total"]["ms"])
            cells = [
                *times,
                total,
                _gb(row["peak_bytes"]),
                *([_gb(row["predicted_bytes"])] if gpu else []),
                _millions(row["trained"]),
            ]
        else:
            cells = _no_figures(row, 5 + len(memory))
        body.append([_title(method), *cells, *([theirs.get(method, "")] if compared else [])])
        if method == "galore" and svd is not None and row["status"] == svd["status"] == "ok":
            tokens = row["id"]["batch"] * row["id"]["context"]
            extra = 1e3 * svd["total"]["ms"] * CONFIGS[name]["num_hidden_layers"] / GAP / tokens
            cells = [_number(row["us_per_token"][phase] + extra) for phase in ("other", "total")]
            body.append(
                [
                    f"{_title(method)}, with its SVD",
                    "",
                    "",
                    *cells,
                    *[""] * (len(memory) + 1),
                    *([theirs.get(f"{method}, with its SVD", "")] if compared else []),
                ]
            )
    return _table(head, body)


def _by_size(row: dict[str, Any]) -> tuple:
    found = row["id"]
    return (
        found["name"],
        *(found.get(key, 0) for key in ("output_dim_factor", "rank_factor", "rank")),
    )


def table14(rows: Rows) -> str:
    """Memory and trained values over p, p_o and LoRA's rank, LLaMA-2 7B, 4 x 2048, checkpointed."""
    head = ("method", "trained M", "peak GB", "predicted GB", "paper GB")
    body = []
    for suite, key in (("model", "peak_bytes"), ("memory", "live_bytes")):
        chosen = _select(rows, suite, model="llama-2-7b", checkpointing=True, batch=4)
        for row in sorted(chosen, key=_by_size):
            found = row["id"]
            if found["name"] in ("losia-pro", "losia-pro-lean") and found["output_dim_factor"] > 0:
                p, p_o = found["rank_factor"], found["output_dim_factor"]
                name = _title(found["name"]).replace(" (ours)", "")
                title, theirs = (
                    f"{name}, p 1/{1 / p:.0f}, p_o {Fraction(p_o)}",
                    paper.LOSIA_GB.get((p, p_o)),
                )
            elif found["name"] in ("lora", "lora-fp32"):
                title, theirs = (
                    f"{_title(found['name'])}, r {found['rank']}",
                    paper.LORA_GB.get(found["rank"]),
                )
            else:
                continue
            theirs = "" if theirs is None else str(theirs)
            if row["status"] != "ok":
                body.append([title, *_no_figures(row, 3), theirs])
            else:
                body.append(
                    [
                        title,
                        _millions(row["trained"]),
                        _gb(row[key]),
                        _gb(row["predicted_bytes"]),
                        theirs,
                    ]
                )
        if body:
            break
    return _table(head, body) if body else ""


def memory(rows: Rows) -> str:
    """The memory model against what was measured: the allocator on a GPU, live tensors of a
    simulated run elsewhere."""
    chosen = [
        row
        for suite in ("model", "memory")
        for row in _select(rows, suite)
        if row["status"] == "ok" and "predicted_bytes" in row and row["predicted_bytes"]
    ]
    head = ("run", "checkpointing", "measured GB", "predicted GB", "predicted / measured")
    body = []
    for row in chosen:
        found, measured = row["id"], row.get("live_bytes") or row["peak_bytes"]
        extra = {
            key: found[key] for key in ("rank_factor", "output_dim_factor", "rank") if key in found
        }
        title = f"{found['model']}, {found['batch']} x {found['context']}, {_title(found['name'])}"
        title += "".join(f", {key.replace('_', ' ')} {value:g}" for key, value in extra.items())
        body.append(
            [
                title,
                "yes" if found["checkpointing"] else "no",
                _gb(measured),
                _gb(row["predicted_bytes"]),
                f"{row['predicted_bytes'] / measured:.3f}",
            ]
        )
    return _table(head, body) if body else ""


def ops(rows: Rows) -> str:
    head = ("op", "size", "form", "ms", "GB/s", "TFLOP/s", "share of the roof", "ours is faster by")
    body = []
    for row in _select(rows, "ops"):
        found = row["id"]
        size = f"{found['model']} {found['linear']}"
        size += f", p 1/{1 / found['p']:.0f}" if "p" in found else ""
        size += f", {found['tokens']} tokens" if "tokens" in found else ""
        if row["status"] != "ok":
            body.append([found["name"], size, *_no_figures(row, 6)])
            continue
        for form, entry in row["forms"].items():
            if entry["status"] != "ok":
                body.append([found["name"], size, form, entry["status"], "", "", "", ""])
                continue
            body.append(
                [
                    found["name"],
                    size,
                    form,
                    _number(entry["ms"]),
                    _number(entry["gbs"], 3),
                    _number(entry["tflops"], 3) if entry["tflops"] else "",
                    f"{entry['share_of_roof']:.2f}",
                    "" if form == "ours" else f"{entry['ms'] / row['forms']['ours']['ms']:.2f} x",
                ]
            )
    return _table(head, body) if body else ""


def output_layer(rows: Rows) -> str:
    """Loss and gradients of the vocabulary projection; p_o 0 is a frozen one, 1 a dense one."""
    body = []
    for row in _select(rows, "output_layer"):
        found = row["id"]
        size = f"{found['vocabulary']} x {found['hidden']}, {found['tokens']} tokens"
        ok = row["status"] == "ok"
        figures = (
            (_number(row["total"]["ms"]), _gb(row["extra_bytes"])) if ok else _no_figures(row, 2)
        )
        body.append([size, f"{found['p_o']:.3g}", found["name"], *figures])
    return (
        _table(("vocabulary", "p_o", "method", "ms", "GB beyond the inputs"), body) if body else ""
    )


def context(rows: Rows) -> str:
    """The longest context in 80 GB at batch 1, checkpointed."""
    chosen = [row for row in _select(rows, "context")]
    body = [
        [
            _title(row["id"]["name"]),
            *(
                [str(row["longest"]), str(row["predicted"] or "")]
                if row["status"] == "ok"
                else _no_figures(row, 2)
            ),
        ]
        for row in chosen
    ]
    return _table(("method", "longest context in 80 GB", "predicted"), body) if body else ""


def budget(rows: Rows) -> str:
    """The fastest measured configuration of each method within each card."""
    chosen = [
        row
        for row in _select(rows, "model", model="llama-2-7b")
        if row["status"] == "ok" and _is_default(row) and "predicted_bytes" in row
    ]
    body = []
    for name in dict.fromkeys(row["id"]["name"] for row in chosen):
        cells = []
        for gigabytes in BUDGETS_GB:
            fitting = [
                row
                for row in chosen
                if row["id"]["name"] == name and row["peak_bytes"] <= gigabytes * 1e9
            ]
            best = min(fitting, key=lambda row: row["us_per_token"]["total"], default=None)
            if best is None:
                cells.append("none")
                continue
            how = "checkpointed" if best["id"]["checkpointing"] else "not checkpointed"
            cells.append(
                f"{1e6 / best['us_per_token']['total']:.0f} ({best['id']['batch']} x 2048, {how})"
            )
        body.append([_title(name), *cells])
    return (
        _table(("method, tokens/s", *(f"within {gigabytes} GB" for gigabytes in BUDGETS_GB)), body)
        if body
        else ""
    )


def scaling(rows: Rows) -> str:
    from .slopes import describe_slopes

    return describe_slopes(
        [row for row in rows if row["id"]["suite"] == "scaling" and row["status"] == "ok"]
    )


def trouble(rows: Rows) -> str:
    """Every row without a figure, with its reason."""
    lines = []
    for row in rows:
        if row["status"] != "ok":
            found = row["id"]
            settings = " ".join(f"{k}={v}" for k, v in found.items() if k not in ("suite", "name"))
            reason = row.get("reason") or f"{row['bytes_asked_for']} bytes asked for"
            lines.append(
                f"- {found['suite']} {found['name']} ({settings}): {row['status']}: {reason}"
            )
    return "\n".join(lines)


TABLES: dict[str, tuple[str, Callable[[Rows], str]]] = {
    "layer": ("One decoder layer", layer),
    "model": ("A whole model", model),
    "table14": ("Memory over p and r", table14),
    "memory": ("The memory model against what was measured", memory),
    "ops": ("Kernels", ops),
    "output_layer": ("The output layer's loss", output_layer),
    "scaling": ("How the cost grows", scaling),
    "context": ("Longest context", context),
    "budget": ("Fastest within a card", budget),
    "trouble": ("Without a figure", trouble),
}
