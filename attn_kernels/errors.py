"""The errors that this package raises where an argument does not fit.

They are a ``ValueError`` or a ``TypeError`` with a common base, so that a caller can tell a refused argument from a
mistake elsewhere: ``patch`` falls back to the original module for these errors only.
"""


class ArgumentError(Exception):
    """An argument does not fit. What is raised is one of the two subclasses."""


class ArgumentValueError(ArgumentError, ValueError):
    """A shape, device, length, number or backend does not fit."""


class ArgumentTypeError(ArgumentError, TypeError):
    """A dtype or type does not fit."""
