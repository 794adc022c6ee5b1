"""Comparison of finished models: measured cost, tasks, statistics and the report."""
