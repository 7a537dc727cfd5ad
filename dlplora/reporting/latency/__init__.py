"""Latency and training-speed records, their tables and figures."""
