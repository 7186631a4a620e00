"""deepspeed.runtime.activation_checkpointing."""

from deepspeed import checkpointing as checkpointing
