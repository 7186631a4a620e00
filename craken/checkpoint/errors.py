"""What can be wrong with a checkpoint on disk."""

from __future__ import annotations


class CheckpointNotFound(FileNotFoundError):
    """There is no such checkpoint: the folder, its `latest` file or the tag is missing."""


class CheckpointDamaged(ValueError):
    """A file of the checkpoint is missing, cut short or changed; the message names the file and the tensor."""
