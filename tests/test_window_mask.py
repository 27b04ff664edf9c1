"""window_mask: windows of the memory, separate for each row and hypothesis."""

from __future__ import annotations

import pytest
import torch

from attn_kernels.mechanisms import window_mask


def test_windows_by_hand() -> None:
    centres = torch.tensor([[0, 3], [9, -2]])
    expected = [[[1, 1, 0, 0, 0], [0, 0, 1, 1, 1]], [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0]]]
    assert window_mask(centres, 1, 5).int().tolist() == expected
    lengths = torch.tensor([3, 5])
    expected[0] = [[1, 1, 0, 0, 0], [0, 0, 1, 0, 0]]
    assert window_mask(centres, 1, 5, lengths).int().tolist() == expected
    assert window_mask(torch.tensor([[1.5]]), 1.5, 5).int().tolist() == [[[1, 1, 1, 1, 0]]]
    assert window_mask(torch.tensor([[2.25]], dtype=torch.bfloat16), 1.3, 5).int().tolist() == [[[0, 1, 1, 1, 0]]]
    assert window_mask(torch.tensor([[1, 3]]), (0, 2), 5).int().tolist() == [[[0, 1, 1, 1, 0], [0, 0, 0, 1, 1]]]
    assert window_mask(torch.zeros(2, 3), 1, 0).shape == (2, 3, 0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.float64])
def test_windows_are_of_each_row(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    centres = torch.randint(0, 12, (3, 4)).to(dtype)
    lengths = torch.tensor([12, 0, 7], dtype=torch.int32)
    mask = window_mask(centres, 2, 12, lengths)
    for b in range(3):
        for k in range(4):
            expected = [abs(j - int(centres[b, k])) <= 2 and j < lengths[b] for j in range(12)]
            assert mask[b, k].tolist() == expected


def test_windows_of_bfloat16_positions_are_exact() -> None:
    """Positions that bfloat16 holds, and distances that it does not: 300 - 257 is 43, and 256 - 257 is not 0."""
    mask = window_mask(torch.tensor([[256.0]], dtype=torch.bfloat16), 3, 600)
    assert mask.nonzero()[:, 2].tolist() == list(range(253, 260))


def test_refusals_of_windows() -> None:
    with pytest.raises(ValueError, match=r"window_mask: centres must have shape \(B, K\), got \(3,\)"):
        window_mask(torch.zeros(3), 1, 5)
    with pytest.raises(TypeError, match=r"window_mask: centres must be numbers, got torch.bool"):
        window_mask(torch.zeros(3, 1, dtype=torch.bool), 1, 5)
    with pytest.raises(ValueError, match=r"window_mask: radius must be a finite number >= 0.0, got -1"):
        window_mask(torch.zeros(3, 1), -1, 5)
    with pytest.raises(
        ValueError, match=r"window_mask: radius must be a number or two, before and after, got \(1, 2, 3\)"
    ):
        window_mask(torch.zeros(3, 1), (1, 2, 3), 5)
    with pytest.raises(ValueError, match=r"window_mask: memory_lengths must have shape \(B,\) = \(3,\), got \(2,\)"):
        window_mask(torch.zeros(3, 1), 1, 5, torch.tensor([1, 2]))
