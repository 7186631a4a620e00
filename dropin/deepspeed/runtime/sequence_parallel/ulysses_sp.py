"""deepspeed.runtime.sequence_parallel.ulysses_sp: what accelerate sets sequence parallelism up with."""

from craken.gaps import NoSequenceParallelism as UlyssesSPAttentionHF  # noqa: F401
from craken.gaps import NoSequenceParallelism as UlyssesSPDataLoaderAdapter  # noqa: F401
