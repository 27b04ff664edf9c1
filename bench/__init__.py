"""Benchmarks: ``python -m bench`` runs all of them; ``python -m bench.ops`` and ``python -m bench.g2p`` one part."""
