"""Runs every op once on GPU backends, forward and backward, on small shapes. compute-sanitizer runs this program.

The arguments are the backends: ``python -m bench.gpu.smoke cuda triton``.
"""

from __future__ import annotations

import sys

import torch

import attn_kernels

# A decode step, beams, partial tiles, full tiles, and fewer steps than in any tile.
SHAPES = ((2, 1, 130, 64, 64), (2, 5, 33, 36, 20), (3, 33, 40, 48, 48), (1, 20, 7, 17, 9))
DTYPES = (torch.float32, torch.bfloat16)


def run(device: str, backends: list[str]) -> int:
    """Returns the number of calls."""
    calls = 0
    generator = torch.Generator().manual_seed(0)
    for backend in backends:
        for batch, queries, steps, units, width in SHAPES:
            for dtype in DTYPES:

                def leaf(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
                    return torch.randn(size, generator=generator).to(device, dtype).requires_grad_()

                query, keys, values = leaf(batch, queries, units), leaf(batch, steps, units), leaf(batch, steps, width)
                v, bias = leaf(units), leaf(units)
                masks = {
                    "memory_lengths": torch.randint(steps + 1, (batch,), generator=generator).to(device),
                    "mask": (torch.rand((batch, queries, steps), generator=generator) > 0.2).to(device),
                }
                for found in (
                    attn_kernels.additive_attention(query, keys, values, v, bias, backend=backend, **masks),
                    attn_kernels.dot_attention(query, keys, values, backend=backend, **masks),
                ):
                    (found.context.sum() + found.alignments.square().sum()).backward()
                attn_kernels.additive_scores(query, keys, v, bias, backend=backend).square().sum().backward()
                calls += 3
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return calls


if __name__ == "__main__":
    here = [name for name in sys.argv[1:] if attn_kernels.backends()[name].available]
    print(f"{run('cuda', here)} calls on {', '.join(here) or 'no backend'}")
