"""deepspeed.zero: weights that are kept as shards."""

from craken import GatheredParameters as GatheredParameters
from craken import Init as Init
from craken import Init as MiCS_Init  # noqa: F401 - `mics_shard_size` decides, not the class
from craken import register_external_parameter as register_external_parameter
from craken import unregister_external_parameter as unregister_external_parameter
from craken.zero import TiledLinear as TiledLinear
from craken.zero import ZeroParamStatus as ZeroParamStatus
from craken.zero.construct import DeepSpeedTensorOverride as DeepSpeedTensorOverride
