"""deepspeed.runtime.dataloader."""

from craken.engine import RepeatingLoader as RepeatingLoader
