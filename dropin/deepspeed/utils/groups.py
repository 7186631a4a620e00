"""deepspeed.utils.groups: what clients ask once sequence parallelism is on."""

from craken.gaps import no_sequence_parallelism as _get_sequence_parallel_group  # noqa: F401
from craken.gaps import no_sequence_parallelism as _get_sequence_parallel_rank  # noqa: F401
from craken.gaps import no_sequence_parallelism as _get_sequence_parallel_world_size  # noqa: F401
