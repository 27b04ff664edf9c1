"""Benchmarks. ``python -m bench`` runs two of them; each module of cpu, gpu and models is a command."""
