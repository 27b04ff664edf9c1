"""Benchmarks of the ops, most of them on the CPU: ops, sweep, roofline."""
