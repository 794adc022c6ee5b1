"""Text to batches: sources, tokenizer, rows, shards and the order they are read in."""
