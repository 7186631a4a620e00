"""DeepSpeed's names, handed over to craken; no logic of its own."""

from craken import DeepSpeedEngine as DeepSpeedEngine
from craken import OnDevice as OnDevice
from craken import add_config_arguments as add_config_arguments
from craken import init_distributed as init_distributed
from craken import initialize as initialize
from craken.comm import get_accelerator as get_accelerator
from craken.gaps import missing as __getattr__  # noqa: F401
from craken.log import log_dist as log_dist
from craken.log import logger as logger
from deepspeed import accelerator, checkpoint, checkpointing, comm, launcher, ops, runtime, utils, zero  # noqa: F401
from deepspeed.runtime.config import DeepSpeedConfig as DeepSpeedConfig
from deepspeed.runtime.config import DeepSpeedConfigError as DeepSpeedConfigError
from deepspeed.version import __version__ as __version__
