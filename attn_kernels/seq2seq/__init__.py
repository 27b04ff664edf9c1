"""The reference sequence-to-sequence model that uses the fused attention."""

from .model import Seq2Seq
from .search import Hypothesis

__all__ = ["Hypothesis", "Seq2Seq"]
