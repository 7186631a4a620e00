"""deepspeed.runtime.zero."""

from deepspeed.runtime.zero import config as config
from deepspeed.runtime.zero import offload_config as offload_config
from deepspeed.runtime.zero import partition_parameters as partition_parameters
from deepspeed.runtime.zero import stage3 as stage3
from deepspeed.runtime.zero import stage_1_and_2 as stage_1_and_2
from deepspeed.zero import *  # noqa: F403 - all of it is offered here too
