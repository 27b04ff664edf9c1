"""Adapters for classes of other libraries: one file for each library, named like its top-level package.

A file imports nothing from its library. It names classes; its adapters are mixed into a class when a model contains it.
"""

import pkgutil

FILES = tuple(file.name for file in pkgutil.iter_modules(__path__))
