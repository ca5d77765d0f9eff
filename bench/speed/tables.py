"""Markdown tables of one device's rows. Pure functions of them, so that they can be made again, byte by byte."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

from ..harness.markdown import number, table
from ..methods import METHODS
from ..methods.galore import GAP
from . import paper
from .models import CONFIGS
from .slopes import describe_slopes

Row = dict[str, Any]
Rows = list[Row]
WHY_NOT = {"missing": "not run", "red": "wrong result", "failed": "failed"}


def select(rows: Rows, suite: str, name: str | None = None, **fields: Any) -> Rows:
    """Rows of a suite whose id has these fields, in the methods' order."""
    wanted = {"suite": suite, **({"name": name} if name else {}), **fields}
    order = {name: place for place, name in enumerate(METHODS)}
    found = [row for row in rows if all(row["id"].get(k) == v for k, v in wanted.items())]
    return sorted(found, key=lambda row: order.get(row["id"]["name"], len(order)))


def _values(rows: Rows, suite: str, field: str) -> list[Any]:
    ids = [row["id"] for row in rows if row["id"]["suite"] == suite]
    return list(dict.fromkeys(found[field] for found in ids if field in found))


def _title(name: str) -> str:
    return METHODS[name].title if name in METHODS else name


def layer_title(name: str) -> str:
    """Of a lone layer: what has a row outside its slot is in it here."""
    return _title(name) + (", in its slot" if f"{name}-off" in METHODS else "")


def _gb(value: int | None) -> str:
    return "" if value is None else f"{value / 1e9:.2f}"


def _millions(value: int) -> str:
    return f"{value / 1e6:.1f}"


def _size_of(row: Row) -> str:
    return "{batch} x {context} tokens, {dtype}".format(**row["id"])


def _no_figures(row: Row, columns: int) -> list[str]:
    """The cells of a row without a figure; none of a row that has one."""
    if row["status"] == "ok":
        return []
    oom = row["status"] == "oom"
    asked = f"out of memory ({_gb(row['bytes_asked_for'])} GB asked for)" if oom else ""
    return [asked or WHY_NOT[row["status"]]] + [""] * (columns - 1)


def _with_spread(timing: dict[str, Any], scale: float = 1.0) -> str:
    ms, low, high = (number(scale * timing[key]) for key in ("ms", "low", "high"))
    return f"{ms} ({low}-{high})"


def over_floor(row: Row) -> float:
    """Median of the steps' ratios, each to a floor's step beside it; before they were kept, the medians' ratio."""
    return row["over_floor"]["median"] if "over_floor" in row else _ratio(row)


def _ratio(row: Row, extra_ms: float = 0.0) -> float:
    return (row["total"]["ms"] + extra_ms) / row["floor_ms"]


def mean_over_floor(row: Row, off: Row, layers: int) -> float:
    """Of a model's layers one observes (``row``), the others do not (``off``)."""
    return ((layers - 1) * over_floor(off) + over_floor(row)) / layers


def layer(rows: Rows) -> str:
    parts = []
    for model in _values(rows, "layer", "model"):
        for stack, what in (("linears", "a decoder layer's linears"), ("block", "a decoder layer")):
            if chosen := select(rows, "layer", model=model, stack=stack):
                text = layer_table(chosen, model, _svd_ms(rows, model))
                parts.append(f"{what} of {model}, {_size_of(chosen[0])}\n\n{text}")
    return "\n\n".join(parts)


LAYER_HEAD = (
    "method | over the floor | ms (20-80 %) | floor ms | forward | backward | update"
    " | saved MiB | peak MiB | trained M"
)


def layer_table(chosen: Rows, model: str, svd_ms: float | None) -> str:
    body, by_name = [], {row["id"]["name"]: row for row in chosen}
    for name, row in by_name.items():
        if name.removesuffix("-off") != name and name.removesuffix("-off") in by_name:
            continue  # stands with the row of the method in its slot
        off = by_name.get(f"{name}-off")
        if off is not None and row["status"] == off["status"] == "ok":
            layers = CONFIGS[model]["num_hidden_layers"]
            mean = f"{mean_over_floor(row, off, layers):.3f}"
            body.append([f"{_title(name)}, mean of {layers} layers", mean] + [""] * 8)
        body.append([layer_title(name), *_layer_cells(row)])
        if off is not None:
            body.append([_title(f"{name}-off"), *_layer_cells(off)])
        if name == "galore" and svd_ms is not None and row["status"] == "ok":
            extra = svd_ms / GAP
            total, update = (number(row[phase]["ms"] + extra) for phase in ("total", "update"))
            cells = f"{_ratio(row, extra):.3f}", total, number(row["floor_ms"])
            body.append([f"{_title(name)}, with its SVD", *cells, "", "", update, "", "", ""])
    return table(LAYER_HEAD, body)


def _layer_cells(row: Row) -> list[str]:
    if row["status"] != "ok":
        return _no_figures(row, 9)
    phases = [number(row[phase]["ms"]) for phase in ("forward", "backward", "update")]
    times = [f"{over_floor(row):.3f}", _with_spread(row["total"]), number(row["floor_ms"]), *phases]
    held = (number(row[key] / 2**20) for key in ("saved_bytes", "peak_bytes"))
    return [*times, *held, _millions(row["trained"])]


def _svd_ms(rows: Rows, model: str) -> float | None:
    """Of a layer's SVDs, if they were measured."""
    found = select(rows, "layer", "galore-svd", model=model)
    return found[0]["total"]["ms"] if found and found[0]["status"] == "ok" else None


def model(rows: Rows) -> str:
    """Table 15: microseconds a token, with and without gradient checkpointing, the paper's beside ours."""
    parts, batch = [], 4 if 4 in _values(rows, "model", "batch") else 1
    for name in _values(rows, "model", "model"):
        for checkpointing in (True, False):
            sized = select(rows, "model", model=name, checkpointing=checkpointing, batch=batch)
            if chosen := list(filter(is_default, sized)):
                how = "with" if checkpointing else "without"
                text = _model_table(chosen, name, checkpointing, _svd_ms(rows, name))
                size = f"{name}, {_size_of(chosen[0])}, {how} gradient checkpointing"
                parts.append(f"{size}, us a token\n\n{text}")
    return "\n\n".join(parts)


def is_default(row: Row) -> bool:
    defaults = {"rank_factor": 1 / 8, "output_dim_factor": 0.0, "rank": 64}
    return all(row["id"].get(key, value) == value for key, value in defaults.items())


def _model_table(chosen: Rows, name: str, checkpointing: bool, svd_ms: float | None) -> str:
    compared, gpu = name == "llama-2-7b", any("predicted_bytes" in row for row in chosen)
    memory = ["peak GB", "predicted GB"] if gpu else ["peak GB above start"]
    what = "forward / backward / total" if checkpointing else "total"
    head = ["method", "forward", "backward", "other", "total (20-80 %)", *memory, "trained M"]
    head += [f"paper, A800: {what}"] if compared else []
    paper_says = paper.CHECKPOINTED if checkpointing else paper.NOT_CHECKPOINTED
    body = []

    def add(title: str, method: str, cells: list[str]) -> None:
        body.append([title, *cells, *([paper_says.get(method, "")] if compared else [])])

    for row in chosen:
        method, cells = row["id"]["name"], _no_figures(row, 5 + len(memory))
        if not cells:
            us = row["us_per_token"]
            cells = [number(us[phase]) for phase in ("forward", "backward", "other")]
            cells.append(_with_spread(row["total"], us["total"] / row["total"]["ms"]))
            cells += [_gb(row["peak_bytes"]), *([_gb(row["predicted_bytes"])] if gpu else [])]
            cells.append(_millions(row["trained"]))
        add(_title(method), method, cells)
        if method == "galore" and svd_ms is not None and row["status"] == "ok":
            tokens = row["id"]["batch"] * row["id"]["context"]
            extra = 1e3 * svd_ms * CONFIGS[name]["num_hidden_layers"] / GAP / tokens
            cells = [number(row["us_per_token"][phase] + extra) for phase in ("other", "total")]
            svd = f"{method}, with its SVD"
            blank = [""] * (len(memory) + 1)
            add(f"{_title(method)}, with its SVD", svd, ["", "", *cells, *blank])
    return table(head, body)


def table14(rows: Rows) -> str:
    """Memory and trained values over p, p_o and LoRA's rank, LLaMA-2 7B, 4 x 2048, checkpointed."""

    def by_size(row: Row) -> tuple:
        sizes = ("output_dim_factor", "rank_factor", "rank")
        return row["id"]["name"], *(row["id"].get(key, 0) for key in sizes)

    body: list[list[str]] = []
    for suite, key in (("model", "peak_bytes"), ("memory", "live_bytes")):
        chosen = select(rows, suite, model="llama-2-7b", checkpointing=True, batch=4)
        for row in sorted([] if body else chosen, key=by_size):
            found, title = row["id"], _title(row["id"]["name"])
            if found["name"] in ("losia-pro", "losia-pro-lean") and found["output_dim_factor"] > 0:
                p, p_o = found["rank_factor"], found["output_dim_factor"]
                title = f"{title.replace(' (ours)', '')}, p 1/{1 / p:.0f}, p_o {Fraction(p_o)}"
                theirs = paper.LOSIA_GB.get((p, p_o), "")
            elif found["name"] in ("lora", "lora-fp32"):
                title, theirs = f"{title}, r {found['rank']}", paper.LORA_GB.get(found["rank"], "")
            else:
                continue
            cells = _no_figures(row, 3)
            if not cells:
                cells = [_millions(row["trained"]), _gb(row[key]), _gb(row["predicted_bytes"])]
            body.append([title, *cells, str(theirs)])
    return table("method | trained M | peak GB | predicted GB | paper GB", body)


def memory(rows: Rows) -> str:
    """The memory model against what was measured: the allocator on a GPU, live tensors of a simulated run elsewhere."""
    body = []
    for row in [*select(rows, "model"), *select(rows, "memory")]:
        if row["status"] == "ok" and (predicted := row.get("predicted_bytes")):
            found, measured = row["id"], row.get("live_bytes") or row["peak_bytes"]
            title = (
                f"{found['model']}, {found['batch']} x {found['context']}, {_title(found['name'])}"
            )
            sizes = [key for key in ("rank_factor", "output_dim_factor", "rank") if key in found]
            title += "".join(f", {key.replace('_', ' ')} {found[key]:g}" for key in sizes)
            how = "yes" if found["checkpointing"] else "no"
            body.append([title, how, _gb(measured), _gb(predicted), f"{predicted / measured:.3f}"])
    return table("run | checkpointing | measured GB | predicted GB | predicted / measured", body)


def ops(rows: Rows) -> str:
    """On a CPU without a roof, which forms that stay in the cache exceed, and without a verdict: ours is eager."""
    chosen, body = [*select(rows, "ops"), *select(rows, "variants")], []
    gpu = any(row.get("kind") != "CPU" for row in chosen)
    head = ["op", "size", "form", "ms", "GB/s", "TFLOP/s"]
    head += ["share of the roof", "ours is faster by"] if gpu else []
    for row in chosen:
        found, blank = row["id"], [""] * (len(head) - 4)
        size = f"{found['model']} {found['linear']}"
        size += f", p {Fraction(found['p']).limit_denominator(100)}" if "p" in found else ""
        size += ", wide" if found.get("subnet") == "wide" else ""
        size += f", {found['tokens']} tokens" if "tokens" in found else ""
        size += f", runs of {found['alignment']}" if found.get("alignment", 1) > 1 else ""
        if row["status"] != "ok":
            body.append([found["name"], size, *_no_figures(row, len(head) - 2)])
            continue
        for form, entry in row["forms"].items():
            cells = [entry["status"], *blank]
            if entry["status"] == "ok":
                flops = number(entry["tflops"], 3) if entry["tflops"] else ""
                cells = [number(entry["ms"]), number(entry["gbs"], 3), flops]
                faster = entry["ms"] / row["forms"]["ours"]["ms"]
                verdict = "" if form == "ours" else f"{faster:.2f} x"
                cells += [f"{entry['share_of_roof']:.2f}", verdict] if gpu else []
            body.append([found["name"], size, form, *cells])
    note = "\n\nOn a CPU ours is eager torch, whose forms differ by noise."
    return table(head, body) + (note if body and not gpu else "")


def output_layer(rows: Rows) -> str:
    body = []
    for row in select(rows, "output_layer"):
        found, cells = row["id"], _no_figures(row, 2)
        size = f"{found['vocabulary']} x {found['hidden']}, {found['tokens']} tokens"
        cells = cells or [number(row["total"]["ms"]), _gb(row["extra_bytes"])]
        body.append([size, f"{found['p_o']:.3g}", found["name"], *cells])
    return table("vocabulary | p_o | method | ms | GB beyond the inputs", body)


def scaling(rows: Rows) -> str:
    return describe_slopes([row for row in select(rows, "scaling") if row["status"] == "ok"])


def trouble(rows: Rows) -> str:
    lines = []
    for row in rows:
        if row["status"] != "ok":
            found = row["id"]
            settings = " ".join(f"{k}={v}" for k, v in found.items() if k not in ("suite", "name"))
            reason = row.get("reason") or f"{row['bytes_asked_for']} bytes asked for"
            what = f"{found['suite']} {found['name']} ({settings})"
            lines.append(f"- {what}: {row['status']}: {reason}")
    return "\n".join(lines)


TABLES: dict[str, tuple[str, Callable[[Rows], str]]] = {
    "layer": ("One decoder layer", layer),
    "model": ("A whole model", model),
    "table14": ("Memory over p and r", table14),
    "memory": ("The memory model against what was measured", memory),
    "ops": ("Kernels", ops),
    "output_layer": ("The output layer's loss", output_layer),
    "scaling": ("How the cost grows", scaling),
    "trouble": ("Without a figure", trouble),
}
