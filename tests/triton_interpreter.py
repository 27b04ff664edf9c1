"""Triton's interpreter, prepared for the tests: it computes the same in less time.

The interpreter replaces the functions of ``triton.language`` at every call of a kernel and of every function in it,
looking through three modules each time. Here it does so once in a process, and leaves them replaced: this process
compiles no kernel (tests/ahead.py does, in another). It also looks for an overflow at every operation of integers,
and without ``debug`` drops what it found. Here it does not look.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np


class _Kept:
    """In place of the scope of replacements that the interpreter would undo after a call."""

    def restore(self) -> None: ...


def once_for_each_language(patch: Callable[[Any], Any], languages: tuple[Any, ...]) -> Callable[[Any], Any]:
    """``patch``, called once for functions that see the same of these modules."""
    done: set[frozenset[str]] = set()

    @functools.cache
    def patch_once(function: Any) -> _Kept:
        seen = [value for value in function.__globals__.values() if inspect.ismodule(value)]
        names = frozenset(language.__name__ for language in languages if language in seen)
        if names not in done:
            patch(function)
            done.add(names)
        return _Kept()

    return patch_once


def by_name(dtype_of: Callable[[Any], np.dtype]) -> Callable[[Any], np.dtype]:
    """``dtype_of``, called once for each name of a type: it builds a table of all of them at each call."""
    known: dict[str, np.dtype] = {}

    def known_dtype(kind: Any) -> np.dtype:
        if kind.name not in known:
            known[kind.name] = dtype_of(kind)
        return known[kind.name]

    return known_dtype


def install() -> None:
    """Changes the interpreter of this process; TRITON_INTERPRET must have selected it."""
    from triton import language
    from triton.runtime import interpreter

    interpreter._patch_lang = once_for_each_language(interpreter._patch_lang, (language, language.core))
    interpreter._get_np_dtype = by_name(interpreter._get_np_dtype)
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
