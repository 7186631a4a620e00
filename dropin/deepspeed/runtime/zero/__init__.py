"""deepspeed.runtime.zero."""

from deepspeed.runtime.zero import partition_parameters as partition_parameters
