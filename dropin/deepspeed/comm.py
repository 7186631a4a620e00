"""deepspeed.comm: craken's world, and torch's collectives over it."""

from torch.distributed import ReduceOp as ReduceOp
from torch.distributed import all_gather as all_gather
from torch.distributed import all_reduce as all_reduce
from torch.distributed import barrier as barrier
from torch.distributed import broadcast as broadcast
from torch.distributed import destroy_process_group as destroy_process_group
from torch.distributed import new_group as new_group

from craken.comm import get_local_rank as get_local_rank
from craken.comm import get_rank as get_rank
from craken.comm import get_world_size as get_world_size
from craken.comm import init_distributed as init_distributed
from craken.comm import is_initialized as is_initialized
