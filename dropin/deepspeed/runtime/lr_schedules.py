"""deepspeed.runtime.lr_schedules."""

from craken.optim import VALID_LR_SCHEDULES as VALID_LR_SCHEDULES
from craken.optim.cycles import LRRangeTest as LRRangeTest
from craken.optim.cycles import OneCycle as OneCycle
from craken.optim.warmup import WarmupCosineLR as WarmupCosineLR
from craken.optim.warmup import WarmupDecayLR as WarmupDecayLR
from craken.optim.warmup import WarmupLR as WarmupLR
