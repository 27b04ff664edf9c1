"""NVIDIA's Tacotron 2 in its own repository, where the file is a top-level module of this name.

Other projects may also have a module ``model``. Their classes have another source, so the adapter does not apply.
"""

from . import tacotron2 as tacotron2
