"""deepspeed.runtime."""

from deepspeed.runtime import activation_checkpointing as activation_checkpointing
from deepspeed.runtime import config as config
from deepspeed.runtime import dataloader as dataloader
from deepspeed.runtime import engine as engine
from deepspeed.runtime import lr_schedules as lr_schedules
from deepspeed.runtime import utils as utils
from deepspeed.runtime import zero as zero
