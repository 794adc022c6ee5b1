"""What axes, metrics and tests are called, and how numbers are written, where people read them."""

from __future__ import annotations

AXIS_WORDS = {
    "active_flops_per_token": "active FLOPs per token",
    "resident_bytes": "resident bytes",
    "kv_bytes_per_token": "KV bytes per token",
    "latency_ms": "decode latency",
    "tokens_per_second": "tokens per second",
}
METRIC_WORDS = {"bits_per_byte": "bits per byte", "accuracy": "accuracy"}
TEST_WORDS = {
    "mcnemar_exact": "exact McNemar",
    "sign_flip_permutation": "paired permutation",
}


def format_si(value: float | None, unit: str = "") -> str:
    """Return a number with an SI prefix: 1.23 M."""
    if value is None:
        return "–"
    size = abs(value)
    for factor, prefix in (
        (1e18, "E"),
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
        (1e3, "k"),
    ):
        if size >= factor:
            return f"{value / factor:.2f} {prefix}{unit}"
    return f"{value:.2f}".rstrip("0").rstrip(".") + (f" {unit}" if unit else "")


def format_score(value: float | None, metric: str) -> str:
    """Return a metric as people write it."""
    if value is None:
        return "–"
    return f"{100 * value:.1f}%" if metric == "accuracy" else f"{value:.4f}"


def format_signed(value: float, metric: str) -> str:
    """Return a difference with its sign."""
    return f"{100 * value:+.1f} pp" if metric == "accuracy" else f"{value:+.4f}"


def format_gap(value: float, metric: str) -> str:
    """Return the size of a difference."""
    return format_signed(abs(value), metric).removeprefix("+")


def format_share(value: float) -> str:
    """Return a signed share in percent."""
    return f"{100 * value:+.1f}%"


def format_seconds(value: float) -> str:
    """Return a duration in its natural unit."""
    for size, unit in ((3600.0, "h"), (60.0, "min")):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.1f} s"


def format_count(value: float) -> str:
    """Return a count as prose says it: 1.23 million."""
    for size, unit in ((1e9, " billion"), (1e6, " million"), (1e3, " thousand")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"
