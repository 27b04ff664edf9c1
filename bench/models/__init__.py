"""Benchmarks of features built on the ops: Seq2Seq, memories, patched and fused models."""
