"""Rarely used options of an attention (``Options`` in types.py), for the kernels that all scores share.

A kernel takes ``option_arguments`` last before its constants. What a call does not have is None there, a constant for
Triton: the kernels of calls without options are what they were. ``NORMALISER`` is in normaliser.py.

Dropout takes the weights of the context, not the alignments that are returned: a weight is multiplied with 0 or 1 here,
and what it is summed up to with 1 / (1 - p), so that nothing overflows in 16 bits. Which weights stay is a function of
the seed and their number in (B, Tq, Tk): see ``dropout_factors`` in reference.py.
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
    """score_bias, its strides stride_sb, stride_sq, stride_sk, and of dropout seed, least, kept_factor, kept_factor_lo;
    clip, clip_lo.

    seed: where the kernel reads it: a graph writes another one there for each replay. least: the first of 2^24 numbers
    with which a weight stays. kept_factor: 1 / (1 - p), in two parts for float64, as the clip is.
    """
    if options is NO_OPTIONS:
        return _NO_ARGUMENTS
    score_bias, p, _, clip, seed = options
    biased = (None,) * 4 if score_bias is None else (score_bias, *score_bias.stride())
    dropped = (None,) * 4 if p == 0 else (seed, math.ceil(p * 2**24), *two_parts(1 / (1 - p), dtype))
    return *biased, *dropped, *((None, None) if clip == 0 else two_parts(clip, dtype))


@triton.jit
def clip_scores(s, allowed, clip, clip_lo):
    """C tanh(s) of scores (Q, K), if there is a clip C, where allowed; -inf elsewhere, of which tanh would make -C."""
    if clip is not None:
        s = tl.where(allowed, (tl.cast(clip, s.dtype) + tl.cast(clip_lo, s.dtype)) * tanh(s, False), -float("inf"))
    return s


@triton.jit
def clip_and_slope(s, clip, clip_lo):
    """C tanh(s) and its derivative, which does not cancel; 0 where that of float64 is: 0 * inf is NaN there."""
    most = tl.cast(clip, s.dtype) + tl.cast(clip_lo, s.dtype)
    t, slope = tanh_and_slope(s, False, ROUNDED=True)
    return most * t, tl.where(tl.abs(s) > SATURATED, 0.0, most * slope)


@triton.jit
def add_score_bias(s, score_bias, i, j, allowed, stride_sq, stride_sk):
    """Scores (Q, K) with their bias, if there is one, where allowed; score_bias points to the row's first element."""
    if score_bias is not None:
        s += tl.load(score_bias + i[:, None] * stride_sq + j[None, :] * stride_sk, mask=allowed, other=0.0).to(s.dtype)
    return s


@triton.jit
def drop(weights, seed, least, b, i, j, Tq, Tk):
    """weights (Q, K) of the queries i and steps j of sentence b, times 0 or 1: a product, because 0 * NaN is NaN.

    SplitMix64 (Steele, Lea, Flood 2014, figure 17), of which 24 bits are compared.
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
    """Sums of weights that dropout has left, times 1 / (1 - p)."""
    if kept_factor is not None:
        sums *= tl.cast(kept_factor, sums.dtype) + tl.cast(kept_factor_lo, sums.dtype)
    return sums
