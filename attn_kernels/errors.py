"""The errors that this package raises if an argument does not fit.

They are a ``ValueError`` or a ``TypeError`` with a common base, so that a caller can distinguish a refused argument
from other errors: ``patch`` falls back to the original module for these errors only.
"""


class ArgumentError(Exception):
    """An argument does not fit. The base class of the two errors below, which are the ones that are raised."""


class ArgumentValueError(ArgumentError, ValueError):
    """A shape, device, length, number or backend does not fit."""


class ArgumentTypeError(ArgumentError, TypeError):
    """A dtype or type does not fit."""
