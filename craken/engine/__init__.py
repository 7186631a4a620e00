"""Config to parts, and the engine users hold."""

from craken.engine.agreement import check_ranks_agree
from craken.engine.build import Parts, build_parts
from craken.engine.data import RepeatingLoader, ResumableLoader
from craken.engine.deepspeed_names import DeepSpeedEngine
from craken.engine.engine import Engine
from craken.engine.memory import see_memory_usage
from craken.engine.monitor import check_monitors
from craken.engine.optimizers import check_buildable
from craken.engine.request import Request, find_config
from craken.engine.support import check_supported

__all__ = [
    "DeepSpeedEngine",
    "Engine",
    "Parts",
    "RepeatingLoader",
    "Request",
    "ResumableLoader",
    "build_parts",
    "check_buildable",
    "check_monitors",
    "check_ranks_agree",
    "check_supported",
    "find_config",
    "see_memory_usage",
]
