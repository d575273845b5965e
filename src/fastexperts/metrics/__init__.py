"""Metrics of training runs: what the router does with its experts."""
