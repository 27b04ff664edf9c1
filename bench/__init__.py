"""Benchmarks: ``python -m bench`` runs all of them; ``python -m bench.ops`` and ``bench.g2p compare`` one part."""
