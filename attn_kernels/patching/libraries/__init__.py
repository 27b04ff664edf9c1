"""Adapters of other libraries' classes: one file each, named as the library's top-level package.

A file imports nothing of its library: it names classes, and its adapters are mixed into them when a model has one.
"""

import pkgutil

FILES = tuple(file.name for file in pkgutil.iter_modules(__path__))
