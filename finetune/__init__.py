"""Teach a model something from a few dozen handwritten examples, and know whether it learned or memorised."""

__version__ = "0.1.0"
