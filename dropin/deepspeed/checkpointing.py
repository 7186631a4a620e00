"""deepspeed.checkpointing: activation checkpointing."""

from craken.recompute import checkpoint as checkpoint
from craken.recompute import configure as configure
from craken.recompute import is_configured as is_configured
from craken.recompute import reset as reset
