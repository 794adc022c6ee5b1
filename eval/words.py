"""What axes, metrics and tests are called where people read them."""

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
