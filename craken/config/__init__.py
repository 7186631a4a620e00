"""The DeepSpeed JSON configuration, parsed once and checked whole."""

from craken.config.batch import BatchSizes, resolve_batch
from craken.config.load import load_config, read_config
from craken.config.mesh import check_mesh
from craken.config.schema import Config
from craken.config.sections.zero import ZeroOptimization

__all__ = ["BatchSizes", "Config", "ZeroOptimization", "check_mesh", "load_config", "read_config", "resolve_batch"]
