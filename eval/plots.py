"""Plots of a report as inline SVG: readable on light and dark ground, the same bytes every time.

Text and axes take the colour of the page (`currentColor`); arms have mid-tone colours that stand
out on white and on black, and a marker of their own, so that colour is never the only sign.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from shoal.eval.words import METRIC_WORDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Report = Mapping[str, Any]

COLOURS = ("#3f7fd1", "#d9822b", "#2f9d72", "#c2559a", "#8a6fd6", "#b3922a", "#2c9fb3", "#d05a4e")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
GREY = "#87919c"
INK = "#010203"  # replaced by currentColor
AXES = (
    ("active_flops_per_token", "MFLOPs per token", 1e6),
    ("resident_bytes", "MB resident", 1e6),
    ("kv_bytes_per_token", "KV cache, kB per token", 1e3),
    ("latency_ms", "ms per token, decoding", 1.0),
)
CONDITIONS = ("precision", "context", "batch")
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "shoal",
    "font.size": 10,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "text.color": INK,
    "axes.grid": True,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "path.simplify": True,
}


def draw_all(report: Report) -> dict[str, str]:
    """Return every plot the report has data for, as SVG text by name."""
    plots: dict[str, Callable[[Report, Figure], bool]] = {
        "quality": _draw_quality,
        "training": _draw_training,
        "cost": _draw_cost,
        "calibration": _draw_calibration,
    }
    sizes = {"quality": (10.4, 3.1), "training": (10.4, 3.3), "cost": (10.4, 3.3)}
    drawn = {}
    for name, draw in plots.items():
        svg = _render(report, name, draw, sizes.get(name, (6.0, 3.4)))
        if svg:
            drawn[name] = svg
    return drawn


def _render(
    report: Report, name: str, draw: Callable[[Report, Figure], bool], size: tuple[float, float]
) -> str:
    """Draw one figure; empty text where the report has no data for it."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    plain: dict[Any, Any] = {k: v for k, v in mpl.rcParamsDefault.items() if k != "backend"}
    with mpl.rc_context(plain | STYLE):  # whatever the user's matplotlibrc says
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        if not draw(report, figure):
            return ""
        _add_legend(report, figure)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return _make_inline(stream.getvalue(), name)


def _make_inline(svg: str, name: str) -> str:
    """Cut what only a file of its own needs, and make ids unique on the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.S)
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(<svg[^>]*?)\s+width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?)\s+height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-").replace(INK, "currentColor")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    # Text without a colour of its own would be black on a dark page.
    return svg.replace('<text style="', '<text fill="currentColor" style="').strip()


def arm_looks(report: Report) -> dict[str, tuple[str, str]]:
    """Colour and marker of every arm."""
    names = [arm["name"] for arm in report["arms"]]
    return {
        name: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)
    }


def _add_legend(report: Report, figure: Figure) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, marker=marker, label=name, markersize=6)
        for name, (colour, marker) in arm_looks(report).items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5))


def _draw_quality(report: Report, figure: Figure) -> bool:
    """Primary metric against every axis of inference cost, targets as dashed lines.

    The points are taken under the first budget's conditions: a target that is meant under others
    would stand in the wrong place, and is left to the table.
    """
    task = report["study"]["primary_task"]
    first = report["budgets"][0]
    alike = [b for b in report["budgets"] if all(b[c] == first[c] for c in CONDITIONS)]
    grid = figure.subplots(1, len(AXES), sharey=True)
    for axes, (axis, label, unit) in zip(grid, AXES, strict=True):
        values = []
        for arm in report["arms"]:
            values.append(_axis_value(arm, axis) / unit)
            _draw_score(axes, report, arm, task, values[-1])
        targets = [b["target"] / unit for b in alike if b["axis"] == axis]
        for target in dict.fromkeys(targets):
            axes.axvline(target, color=GREY, linestyle="--", linewidth=1)
        axes.set_xlabel(label)
        _widen(axes, [*values, *targets])
    metric = report["verdict"]["metric"]
    better = "higher" if metric == "accuracy" else "lower"
    grid[0].set_ylabel(f"{METRIC_WORDS[metric]} ({better} is better)")
    return True


def _axis_value(arm: Report, axis: str) -> float:
    inference = arm["inference"]
    return {
        "active_flops_per_token": inference["flops_per_token"],
        "resident_bytes": inference["bytes_resident"],
        "kv_bytes_per_token": inference["kv_bytes_per_token"],
        "latency_ms": inference["latency_ms"]["decode"]["median"],
    }[axis]


def _draw_score(axes: Axes, report: Report, arm: Report, task: str, x: float) -> None:
    """Draw an arm's mean with its seeds as a thin bar: the spread that counts."""
    colour, marker = arm_looks(report)[arm["name"]]
    score = arm["tasks"][task]
    seeds = [one["value"] for one in score["per_seed"]]
    axes.vlines(x, min(seeds), max(seeds), color=colour, linewidth=5, alpha=0.35)
    axes.plot([x], [score["value"]], marker=marker, color=colour, markersize=7, linestyle="none")


def _widen(axes: Axes, values: Sequence[float]) -> None:
    """Give points room, also where all arms are equal."""
    low, high = min(values), max(values)
    room = max(0.18 * (high - low), 0.08 * abs(high), 1e-9)
    axes.set_xlim(low - room, high + room)
    axes.locator_params(axis="x", nbins=4)


def _draw_training(report: Report, figure: Figure) -> bool:
    """Training loss and validation bits per byte over tokens; one thin line a seed."""
    left, right = figure.subplots(1, 2)
    drawn = False
    looks = arm_looks(report)
    for arm in report["arms"]:
        for seed, curve in enumerate(arm["training"]["curves"]):
            style: dict[str, Any] = {
                "color": looks[arm["name"]][0],
                "alpha": 1.0 if seed == 0 else 0.5,
                "linewidth": 1.5 if seed == 0 else 1.0,
            }
            checks = curve["validation"]
            bits = [b for b in checks["bits_per_byte"] if b is not None]
            if curve["tokens"]:
                millions = [t / 1e6 for t in curve["tokens"]]
                left.plot(millions, _smooth(curve["loss"]), **style)
                drawn = True
            if bits and len(bits) == len(checks["tokens"]):
                right.plot(
                    [t / 1e6 for t in checks["tokens"]],
                    bits,
                    marker=looks[arm["name"]][1],
                    markersize=3.5,
                    **style,
                )
                drawn = True
    left.set_ylabel("training loss, nats per token")
    right.set_ylabel("validation, bits per byte")
    for axes in (left, right):
        axes.set_xlabel("training tokens, million")
    return drawn


def _smooth(values: Sequence[float]) -> list[float]:
    """Running mean that forgets a tenth a point, started unbiased."""
    share = 0.1
    smoothed, mean, weight = [], 0.0, 0.0
    for value in values:
        mean = (1 - share) * mean + share * value
        weight = (1 - share) * weight + share
        smoothed.append(mean / weight)
    return smoothed


def _draw_cost(report: Report, figure: Figure) -> bool:
    """Total cost over domains, and over tokens served by one domain's model."""
    curve = report["cost_curve"]
    if curve is None:
        return False
    left, right = figure.subplots(1, 2)
    for name, (colour, marker) in arm_looks(report).items():
        if name in curve["by_domains"]:
            hours = [s / 3600 for s in curve["by_domains"][name]["device_seconds"]]
            left.plot(curve["domains"], hours, color=colour, marker=marker, markersize=4)
            flops = curve["by_deployed_tokens"][name]["flops"]
            right.plot(curve["deployed_tokens"], flops, color=colour, marker=marker, markersize=4)
    left.set_xscale("log", base=2)
    left.set_xticks(curve["domains"], [str(count) for count in curve["domains"]])
    left.set_yscale("log")
    left.set_xlabel("domains")
    left.set_ylabel("device-hours to train, in all")
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xlabel("tokens served")
    right.set_ylabel("FLOPs, training and serving")
    for axes in (left, right):
        axes.minorticks_off()
    return True


def _draw_calibration(report: Report, figure: Figure) -> bool:
    """Accuracy by rank of confidence."""
    found = list(_calibrations(report))
    if not found:
        return False
    axes = figure.subplots()
    looks = arm_looks(report)
    for name, bins in found:
        share = [(i + 0.5) / len(bins) for i in range(len(bins))]
        colour, marker = looks[name]
        accuracy = [b["accuracy"] for b in bins]
        axes.plot(share, accuracy, color=colour, marker=marker, markersize=4.5)
    axes.axhline(0.5, color=GREY, linestyle="--", linewidth=1)
    axes.set_ylim(0, 1)
    axes.set_xlim(0, 1)
    axes.set_xlabel("items ranked by confidence, least sure first")
    axes.set_ylabel("accuracy")
    return True


def _calibrations(report: Report) -> Iterator[tuple[str, list[dict[str, float]]]]:
    """Arms of the first calibrated task."""
    for task in list(report["calibration"])[:1]:
        for name, one in report["calibration"][task].items():
            yield name, one["bins"]
