"""The version that clients' gates see: the original's that this drop-in stands for, and its own number."""

__version__ = "0.19.6+craken1"
