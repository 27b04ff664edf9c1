"""Benchmarks: ``python -m bench`` runs the first two; cpu, gpu and models have a command for each of them."""
