"""Attention mechanisms with a state of their own, such as the alignments of the step before. See stateful.py."""

from .stateful import StatefulAttention, StatefulResult

__all__ = ["StatefulAttention", "StatefulResult"]
