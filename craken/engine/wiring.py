"""What shard groups talk through: the axes of the mesh and what carries gathers and sums over them, from the config.

                                gathers of weights                  sums of gradients
    plain stage 3               all ranks                           all ranks
    mics_shard_size             shard axis                          shard axis; at the boundary the replicate axis
    zero_hpz_partition_size     all ranks once a step, then inner   all ranks
    zero_quantized_weights      8 bits an element                   -
    zero_quantized_gradients    -                                   4 bits an element, inside nodes, then between

Rows combine, but not MiCS and hpZ: both say how far a gather reaches.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from craken.comm import (
    ErrorFeedback,
    MeshAxis,
    QuantisedGather,
    QuantisedReduce,
    Transport,
    channel_over,
    gather_objects,
    get_local_world_size,
    split_axis,
    transport_for,
)
from craken.config import ZeroOptimization
from craken.zero import Replication, Shelf, Sources, Wire, policy_for_stage


class Wires(NamedTuple):
    """For groups that train and for frozen ones."""

    trained: Wire
    frozen: Wire


def wires_for(zero: ZeroOptimization, axis: MeshAxis, shelf: Shelf) -> Wires:
    """Collective over `axis`, the data-parallel one: return what its ranks' shard groups talk through.

    Sizes divide the number of ranks: `check_mesh` has seen to it.
    """
    if not policy_for_stage(zero.stage).frees_params:
        transport = transport_for(axis)
        wire = Wire(axis, transport, shelf, Sources(transport, transport))
        return Wires(wire, wire)
    replication = None
    if zero.mics_shard_size > 0:
        everyone = axis
        axis, replicate_axis = split_axis(axis, zero.mics_shard_size)
        replication = Replication(channel_over(replicate_axis), everyone)
    wire = Wire(axis, _sums(zero, axis), shelf, _sources(zero, axis), replication)
    rounds_frozen = zero.zero_quantized_weights or zero.zero_quantized_nontrainable_weights
    exact, quick = wire.weights.exact, wire.weights.quick
    return Wires(
        replace(wire, weights=replace(wire.weights, quick=quick if zero.zero_quantized_weights else exact)),
        replace(wire, weights=replace(wire.weights, quick=quick if rounds_frozen else exact)),
    )


def _sources(zero: ZeroOptimization, axis: MeshAxis) -> Sources:
    """Collective over `axis`: return the ways in which weights come together, all of them."""
    channel, inner = channel_over(axis), None
    if zero.zero_hpz_partition_size > 1:
        inner = channel_over(split_axis(axis, zero.zero_hpz_partition_size)[0])
    return Sources(channel.transport, QuantisedGather(channel), inner)


def _sums(zero: ZeroOptimization, axis: MeshAxis) -> Transport:
    """Collective over `axis`: return what carries sums of gradients, and gathers of what is kept whole."""
    if not zero.zero_quantized_gradients:
        return transport_for(axis)
    inner, outer = split_axis(axis, _ranks_per_node(zero, axis))
    loco = zero.zeropp_loco_param
    feedback = None if loco is None else ErrorFeedback(beta=loco.err_beta, reset_after=loco.reset_T)
    return QuantisedReduce(channel_over(axis), channel_over(inner), channel_over(outer), feedback=feedback)


def _ranks_per_node(zero: ZeroOptimization, axis: MeshAxis) -> int:
    """Collective over `axis`: return how many neighbours on it share fast links; all of them where nodes differ."""
    if zero.zero_hpz_partition_size > 1:
        return zero.zero_hpz_partition_size
    counts = set(gather_objects(get_local_world_size(), axis))
    count = counts.pop()
    return count if not counts and axis.size % count == 0 else axis.size
