"""Records which configuration keys DeepSpeed reads: run it with a Python that has DeepSpeed 0.19.6 and no Craken.

`python record_original_keys.py original_sample.json original_keys.json`; the sample is a configuration with every
section in it, so that every branch of the reader is taken.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator, KeysView
from typing import Any

READ: set[str] = set()


class Spy(dict):  # type: ignore[type-arg]
    """A dict that notes under which path its keys are asked for."""

    def __init__(self, data: dict[str, Any], path: str = "") -> None:
        super().__init__()
        self.path = path
        for key, value in data.items():
            super().__setitem__(key, Spy(value, self._join(key)) if isinstance(value, dict) else value)

    def _join(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key

    def _note(self, key: object) -> None:
        READ.add(self._join(str(key)))

    def __getitem__(self, key: str) -> Any:
        self._note(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self._note(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self._note(key)
        return super().__contains__(key)

    def keys(self) -> KeysView[str]:
        return _Keys(self)

    def pop(self, key: str, *default: Any) -> Any:
        self._note(key)
        return super().pop(key, *default)

    def __copy__(self) -> Spy:
        return Spy(self, self.path)

    def __deepcopy__(self, memo: dict[int, Any]) -> Spy:
        return Spy(self, self.path)


class _Keys(KeysView[str]):
    """The keys of a Spy; asking whether one is there is noted too."""

    def __contains__(self, key: object) -> bool:
        return key in self._mapping

    def __iter__(self) -> Iterator[str]:
        return dict.__iter__(self._mapping)  # type: ignore[arg-type]


def _model_keys(model: Any, path: str) -> Iterator[str]:
    """Yield the paths of every field and alias of a pydantic model and of the models inside it."""
    for name, field in model.model_fields.items():
        for key in {name, field.alias or name}:
            yield f"{path}.{key}"
        for part in [field.annotation, *getattr(field.annotation, "__args__", ())]:
            if hasattr(part, "model_fields"):
                yield from _model_keys(part, f"{path}.{name}")


def main() -> None:
    """Read the sample through the original and write the keys that it asked for."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.compile.config import CompileConfig
    from deepspeed.inference.config import WeightQuantConfig
    from deepspeed.monitor.config import DeepSpeedMonitorConfig
    from deepspeed.runtime.config import DeepSpeedConfig, HybridEngineConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    with open(sys.argv[1], encoding="utf-8") as file:
        sample = json.load(file)
    DeepSpeedConfig(copy.copy(Spy(sample)))
    models = {
        "zero_optimization": DeepSpeedZeroConfig,
        "fp16": DeepSpeedFP16Config,
        "bf16": DeepSpeedBF16Config,
        "comms_logger": CommsLoggerConfig,
        "compile": CompileConfig,
        "hybrid_engine": HybridEngineConfig,
        "weight_quantization": WeightQuantConfig,
        "tensor_parallel": TPTrainingConfig,
        "timers.throughput": DeepSpeedThroughputTimerConfig,
    }
    for path, model in models.items():
        READ.update(_model_keys(model, path))
    READ.update(key.lstrip(".") for key in _model_keys(DeepSpeedMonitorConfig, ""))
    with open(sys.argv[2], "w", encoding="utf-8") as file:
        json.dump(sorted(READ), file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main()
