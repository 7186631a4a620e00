"""Dtypes and loss scales."""

from craken.precision.dtypes import Precision, dtype_from_name, master_dtype
from craken.precision.loss_scale import DynamicLossScale, LossScale, StaticLossScale

__all__ = ["DynamicLossScale", "LossScale", "Precision", "StaticLossScale", "dtype_from_name", "master_dtype"]
