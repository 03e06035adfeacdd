"""Activation-informed merge methods for mergekit.

Importing this package imports neither torch nor mergekit; see ``autoload`` for how the
methods reach mergekit's registry.
"""

__version__ = "0.1.0"
