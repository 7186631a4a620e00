"""The `compression_training` section: quantisation and pruning that start while training runs."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from craken.config.section import Section
from craken.config.values import Count, Counts, Flag, Fraction, Object, PositiveCount, Text, Texts, choice

QuantizationType = Annotated[str, choice("symmetric", "asymmetric")]


class MixedQuantize(Section):
    """Half precision that gives way to quantised weights bit by bit."""

    enabled: Flag = False
    quantize_change_ratio: Fraction = 0.001


class WeightQuantizationShared(Section):
    """Settings of all weight-quantisation groups."""

    enabled: Flag = False
    quantizer_kernel: Flag = False
    schedule_offset: Count = 0
    quantize_groups: PositiveCount = 1
    quantize_verbose: Flag = False
    quantization_type: QuantizationType = "symmetric"
    quantize_weight_in_forward: Flag = False
    rounding: Annotated[str, choice("nearest", "stochastic")] = "nearest"
    fp16_mixed_quantize: MixedQuantize = Field(default_factory=MixedQuantize)


class ActivationQuantizationShared(Section):
    """Settings of all activation-quantisation groups."""

    enabled: Flag = False
    quantization_type: QuantizationType = "symmetric"
    range_calibration: Annotated[str, choice("dynamic", "static")] = "dynamic"
    schedule_offset: Count = 1000


class SparsePruningShared(Section):
    """Settings of all sparse-pruning groups."""

    enabled: Flag = False
    method: Annotated[str, choice("l1", "topk", "snip_momentum")] = "l1"
    schedule_offset: Count = 1000
    schedule_offset_end: Count = 1000
    schedule_offset_stride: PositiveCount = 1
    block_pattern: Text = "4x1"
    dense_ratio: Fraction = 0.1
    excluded_modules: Texts = Field(default_factory=list)


class RowPruningShared(Section):
    """Settings of all row- or channel-pruning groups."""

    enabled: Flag = False
    method: Annotated[str, choice("l1", "topk")] = "l1"
    schedule_offset: Count = 1000


class HeadPruningShared(Section):
    """Settings of all head-pruning groups."""

    enabled: Flag = False
    method: Annotated[str, choice("l1", "topk")] = "topk"
    schedule_offset: Count = 1000
    num_heads: PositiveCount | None = None


class WeightQuantizationTechnique(Section):
    """Weights with few bits."""

    shared_parameters: WeightQuantizationShared = Field(default_factory=WeightQuantizationShared)
    different_groups: Object = Field(default_factory=dict)


class ActivationQuantizationTechnique(Section):
    """Activations with few bits."""

    shared_parameters: ActivationQuantizationShared = Field(default_factory=ActivationQuantizationShared)
    different_groups: Object = Field(default_factory=dict)


class SparsePruningTechnique(Section):
    """Single weights set to zero."""

    shared_parameters: SparsePruningShared = Field(default_factory=SparsePruningShared)
    different_groups: Object = Field(default_factory=dict)


class RowPruningTechnique(Section):
    """Rows or channels of weights set to zero."""

    shared_parameters: RowPruningShared = Field(default_factory=RowPruningShared)
    different_groups: Object = Field(default_factory=dict)


class HeadPruningTechnique(Section):
    """Attention heads set to zero."""

    shared_parameters: HeadPruningShared = Field(default_factory=HeadPruningShared)
    different_groups: Object = Field(default_factory=dict)


class LayerReduction(Section):
    """A student with fewer layers, started from the teacher's."""

    enabled: Flag = False
    keep_number_layer: PositiveCount | None = None
    module_name_prefix: Text | None = None
    teacher_layer: Counts | None = None
    other_module_name: Texts | None = None


class CompressionTraining(Section):
    """Every compression technique."""

    weight_quantization: WeightQuantizationTechnique = Field(default_factory=WeightQuantizationTechnique)
    activation_quantization: ActivationQuantizationTechnique = Field(default_factory=ActivationQuantizationTechnique)
    sparse_pruning: SparsePruningTechnique = Field(default_factory=SparsePruningTechnique)
    row_pruning: RowPruningTechnique = Field(default_factory=RowPruningTechnique)
    head_pruning: HeadPruningTechnique = Field(default_factory=HeadPruningTechnique)
    channel_pruning: RowPruningTechnique = Field(default_factory=RowPruningTechnique)
    shared_parameters: Object = Field(default_factory=dict)
    layer_reduction: LayerReduction = Field(default_factory=LayerReduction)
