"""NVIDIA's Tacotron 2 in its repository, where the file is a top-level module of this name.

Other projects have a module ``model``, too: a class of theirs has another source, which the adapter is not for.
"""

from . import tacotron2 as tacotron2
