"""The examples of README.md run, one after the other, and give the shapes that stand beside them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

README = Path(__file__).parent.parent / "README.md"


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What the examples leave behind."""
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, README.name, "exec"), names)
    return names


def test_the_eager_code_is_equivalent(names: dict[str, Any]) -> None:
    tensors = [names[name].double() for name in ("query", "keys", "values", "v")]
    lengths = names["lengths"].clamp(min=1)  # the eager code gives NaN for a length of 0
    expected = names["eager_attention"](*tensors, lengths)
    for result, other in zip(names["additive_attention"](*tensors, memory_lengths=lengths), expected, strict=True):
        torch.testing.assert_close(result, other)


def test_shapes(names: dict[str, Any]) -> None:
    assert names["averaged"].shape == (8, 1, 1024)
    assert names["states"].shape == (64, 30, 256)
    assert names["context"].shape == (64, 30, 512)
    assert names["logits"].shape == (8, 10, 40)
    assert names["alignments"].shape == (8, 10, 12)
    assert names["loss"].isfinite()
    assert len(names["hypotheses"]) == 8


def test_links(names: dict[str, Any]) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (README.parent / target).exists(), target
