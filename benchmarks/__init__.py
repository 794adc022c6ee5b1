"""Speed claims, ours and the peer in turns in one run: `python -m benchmarks.NAME [--quick]`."""
