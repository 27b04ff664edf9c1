"""ESPnet: the attention of its recurrent decoders (``espnet.nets.pytorch_backend.rnn.attentions``).

A decoder calls ``reset()`` for each batch and then the module for each step; the first step projects the encoder's
output and keeps it in the module's attributes, which decoders read and write. They are kept here as they are there.

Supported: steps whose mask leaves each utterance something to attend (masks.py), without a window around the last
attended frame and outside of torch.compile; everything else runs the original. Padding that holds NaN is ignored, where
the original's context would be NaN. The bias of ``gvec`` adds the same to all scores of a softmax: its gradient is 0.
"""

from . import forward as forward
from . import heads as heads
from . import single as single
