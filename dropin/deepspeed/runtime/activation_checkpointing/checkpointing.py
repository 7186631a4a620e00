"""deepspeed.runtime.activation_checkpointing.checkpointing."""

from deepspeed.checkpointing import *  # noqa: F403 - all of it is offered here too
