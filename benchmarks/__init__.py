"""Metrics, evaluation and timings."""
