"""deepspeed.accelerator."""

from craken.comm import get_accelerator as get_accelerator
