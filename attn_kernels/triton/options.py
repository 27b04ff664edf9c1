"""Rarely used options of an attention (``Options`` in types.py), for the kernels that all scores share.

The ``option_arguments`` of a kernel come directly before its constants. An option that a call does not have is None,
a constant for Triton, so kernels of calls without options have no code for them. ``NORMALISER`` is in normaliser.py.

Dropout applies to the weights of the context, not to the returned alignments. A weight is multiplied by 0 or 1 here,
and the sum of weighted values by 1 / (1 - p), so that nothing overflows in 16 bits. The seed and the index of a weight
in (B, Tq, Tk) decide whether it is kept: see ``dropout_factors`` in reference.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from ..types import Options
from .activations import SATURATED, tanh_and_slope
from .additive_math import tanh
from .arguments import two_parts

NO_OPTIONS = Options()
_NO_ARGUMENTS = (None,) * 10


def option_arguments(options: Options, dtype: torch.dtype) -> tuple[Any, ...]:
    """score_bias, its strides stride_sb, stride_sq, stride_sk; for dropout seed, least, kept_factor, kept_factor_lo;
    clip, clip_lo.

    seed: a tensor from which the kernel reads it, because a CUDA graph writes a new seed for each replay. least: the
    smallest of 2^24 numbers for which a weight is kept. kept_factor: 1 / (1 - p), in two parts for float64, like clip.
    """
    if options is NO_OPTIONS:
        return _NO_ARGUMENTS
    score_bias, p, _, clip, seed = options
    biased = (None,) * 4 if score_bias is None else (score_bias, *score_bias.stride())
    dropped = (None,) * 4 if p == 0 else (seed, math.ceil(p * 2**24), *two_parts(1 / (1 - p), dtype))
    return *biased, *dropped, *((None, None) if clip == 0 else two_parts(clip, dtype))


@triton.jit
def clip_scores(s, allowed, clip, clip_lo):
    """C tanh(s) of scores (Q, K), if there is a clip C. Scores that are not allowed stay -inf: C tanh(-inf) is -C."""
    if clip is not None:
        s = tl.where(allowed, (tl.cast(clip, s.dtype) + tl.cast(clip_lo, s.dtype)) * tanh(s, False), -float("inf"))
    return s


@triton.jit
def clip_and_slope(s, clip, clip_lo):
    """C tanh(s) and its derivative, computed without cancellation; 0 where it is 0 in float64: 0 * inf would be NaN."""
    most = tl.cast(clip, s.dtype) + tl.cast(clip_lo, s.dtype)
    t, slope = tanh_and_slope(s, False, ROUNDED=True)
    return most * t, tl.where(tl.abs(s) > SATURATED, 0.0, most * slope)


@triton.jit
def add_score_bias(s, score_bias, i, j, allowed, stride_sq, stride_sk):
    """Scores (Q, K) plus their bias, if there is one, where allowed; score_bias points to the row's first element."""
    if score_bias is not None:
        s += tl.load(score_bias + i[:, None] * stride_sq + j[None, :] * stride_sk, mask=allowed, other=0.0).to(s.dtype)
    return s


@triton.jit
def drop(weights, seed, least, b, i, j, Tq, Tk):
    """weights (Q, K) of the queries i and steps j of sentence b, times 0 or 1: a product, because 0 * NaN is NaN.

    SplitMix64 (Steele, Lea, Flood 2014, figure 17); 24 bits of it are compared.
    """
    if seed is not None:
        index = ((b * Tq + i[:, None]) * Tk + j[None, :]).to(tl.uint64)
        z = (index + 1) * 0x9E3779B97F4A7C15 + tl.cast(tl.load(seed), tl.uint64)
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB
        z = (z ^ (z >> 31)) >> 40
        weights *= (z.to(tl.int32) >= least).to(weights.dtype)
    return weights


@triton.jit
def scale_kept(sums, kept_factor, kept_factor_lo):
    """Sums over the weights that dropout has kept, times 1 / (1 - p)."""
    if kept_factor is not None:
        sums *= tl.cast(kept_factor, sums.dtype) + tl.cast(kept_factor_lo, sums.dtype)
    return sums
