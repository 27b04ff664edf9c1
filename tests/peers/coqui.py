"""coqui-tts 0.28.0: its attentions, without importing all of it. Importing this skips the file where it is missing."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import pytest

_found = importlib.util.find_spec("TTS")
if _found is None:
    pytest.skip("coqui-tts is not installed: see tests/peers/requirements.txt", allow_module_level=True)
for _name in ("TTS", "TTS.tts", "TTS.tts.layers", "TTS.tts.layers.tacotron"):  # packages that import all of coqui-tts
    _package = types.ModuleType(_name)
    _package.__path__ = [str(Path(_found.origin).parent.joinpath(*_name.split(".")[1:]))]
    sys.modules.setdefault(_name, _package)

attentions = pytest.importorskip(
    "TTS.tts.layers.tacotron.attentions", reason="coqui-tts: something that it imports is missing"
)
