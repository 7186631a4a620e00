"""Craken: train, fine-tune and serve PyTorch models larger than one device."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from craken.version import __version__

if TYPE_CHECKING:
    from craken.api import add_config_arguments as add_config_arguments
    from craken.api import check_config as check_config
    from craken.api import initialize as initialize
    from craken.comm import init_distributed as init_distributed
    from craken.engine import DeepSpeedEngine as DeepSpeedEngine
    from craken.engine import Engine as Engine
    from craken.stop import StopRequest as StopRequest
    from craken.zero import GatheredParameters as GatheredParameters
    from craken.zero import Init as Init
    from craken.zero import OnDevice as OnDevice
    from craken.zero import register_external_parameter as register_external_parameter
    from craken.zero import unregister_external_parameter as unregister_external_parameter

# public name -> the module that defines it; imported at first use, so that `craken.config` needs no torch
_PUBLIC = {
    "initialize": "craken.api",
    "add_config_arguments": "craken.api",
    "check_config": "craken.api",
    "init_distributed": "craken.comm",
    "Engine": "craken.engine",
    "GatheredParameters": "craken.zero",
    "Init": "craken.zero",
    "OnDevice": "craken.zero",
    "register_external_parameter": "craken.zero",
    "unregister_external_parameter": "craken.zero",
    "DeepSpeedEngine": "craken.engine",
    "StopRequest": "craken.stop",
}

__all__ = [
    "DeepSpeedEngine",
    "Engine",
    "GatheredParameters",
    "Init",
    "OnDevice",
    "StopRequest",
    "__version__",
    "add_config_arguments",
    "check_config",
    "init_distributed",
    "initialize",
    "register_external_parameter",
    "unregister_external_parameter",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'craken' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
