"""deepspeed.comm: torch's collectives, over craken's world."""

from torch.distributed import *  # noqa: F403 - all of it is offered here too
from torch.distributed import ReduceOp as ReduceOp
from torch.distributed.distributed_c10d import _get_default_group as get_world_group  # noqa: F401

from craken.comm import get_local_rank as get_local_rank
from craken.comm import get_rank as get_rank
from craken.comm import get_world_size as get_world_size
from craken.comm import init_distributed as init_distributed
from craken.comm import is_initialized as is_initialized
