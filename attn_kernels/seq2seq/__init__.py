"""The reference sequence-to-sequence model that uses the fused attention."""

from .encoder import Encoder
from .model import Seq2Seq
from .search import Hypothesis

__all__ = ["Encoder", "Hypothesis", "Seq2Seq"]
