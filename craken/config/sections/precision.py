"""Sections that choose the numbers' formats: fp16, bf16, autocast, data types."""

from __future__ import annotations

from pydantic import Field

from craken.config.section import Section
from craken.config.values import Count, Dtype, Flag, Object, PositiveCount, Rate, Texts


class Fp16(Section):
    """Half precision with loss scaling; `loss_scale` 0 means a dynamic scale that starts at 2**initial_scale_power."""

    enabled: Flag = False
    auto_cast: Flag = False
    loss_scale: Rate = 0.0
    initial_scale_power: Count = 16
    loss_scale_window: Count = 1000
    hysteresis: PositiveCount = 2
    consecutive_hysteresis: Flag = False
    min_loss_scale: Rate = 1.0
    fp16_master_weights_and_grads: Flag = False


class Bf16(Section):
    """bfloat16 compute with an fp32 master copy."""

    enabled: Flag = False
    immediate_grad_update: Flag = False
    check_grad_overflow: Flag = True
    bf16_master_weights_and_grads: Flag = False
    bf16_optimizer_states: Flag = False


class TorchAutocast(Section):
    """torch.autocast around the forward pass, parameters kept in fp32."""

    enabled: Flag = False
    dtype: Dtype | None = None
    lower_precision_safe_modules: Texts | None = None


class DataTypes(Section):
    """Formats of what is stored: accumulated gradients, parameters, buffers."""

    grad_accum_dtype: Dtype | None = None
    param_dtype: Dtype | None = None
    buffer_dtype: Dtype | None = None


class WeightQuantization(Section):
    """Quantised weights for inference under ZeRO."""

    enabled: Flag = True
    num_bits: PositiveCount = 8
    q_type: str = "symmetric"
    q_groups: PositiveCount = 1
    quantized_initialization: Object = Field(default_factory=dict)
    post_init_quant: Object = Field(default_factory=dict)
