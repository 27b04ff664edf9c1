"""Benchmarks of what is above the ops: Seq2Seq, memories, patched and fused models."""
