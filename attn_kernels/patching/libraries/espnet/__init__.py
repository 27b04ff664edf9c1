"""ESPnet: the attention of its recurrent decoders (``espnet.nets.pytorch_backend.rnn.attentions``).

A decoder calls ``reset()`` for each batch and then the module for each step. The first step projects the encoder's
output and stores it in the module's attributes, which decoders read and write. The adapters use the same attributes.

Supported: steps whose mask allows each utterance to attend something (masks.py), without a window around the last
attended frame and outside of torch.compile; everything else runs the original. Padding that holds NaN is ignored; the
original's context would be NaN. The bias of ``gvec`` adds the same to all scores of a softmax: its gradient is 0.
"""

from collections.abc import Callable
from itertools import chain
from typing import Any

from ....deprecation import renamed
from . import forward as forward
from . import heads as heads
from . import single as single

# The adapters were in this file in earlier versions, so their names remain importable from it.
_adapters = chain.from_iterable(vars(part).items() for part in (single, heads, forward))
__getattr__: Callable[[str], Any] = renamed(__name__, {k: x for k, x in _adapters if k.startswith("FusedAtt")})
