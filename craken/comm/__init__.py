"""Backend, mesh axes, collectives with byte counts and an event log."""

from craken.comm.accelerator import Accelerator, get_accelerator
from craken.comm.events import Event, bytes_sent, event_log
from craken.comm.feedback import ErrorFeedback
from craken.comm.mailbox import Mailbox
from craken.comm.mesh import MeshAxis, axis_over, split_axis, world_axis
from craken.comm.objects import (
    all_reduce_sum,
    barrier,
    broadcast,
    broadcast_object,
    gather_objects,
)
from craken.comm.quantised import QuantisedGather, QuantisedReduce
from craken.comm.tracing import phase
from craken.comm.transport import Channel, Pending, Transport, Waitable, channel_over, start_sum, transport_for
from craken.comm.world import (
    get_local_rank,
    get_local_world_size,
    get_rank,
    get_world_size,
    init_distributed,
    is_initialized,
    shutdown,
)

__all__ = [
    "Accelerator",
    "Channel",
    "ErrorFeedback",
    "Event",
    "Mailbox",
    "MeshAxis",
    "Pending",
    "QuantisedGather",
    "QuantisedReduce",
    "Transport",
    "Waitable",
    "all_reduce_sum",
    "axis_over",
    "barrier",
    "broadcast",
    "broadcast_object",
    "bytes_sent",
    "channel_over",
    "event_log",
    "gather_objects",
    "get_accelerator",
    "get_local_rank",
    "get_local_world_size",
    "get_rank",
    "get_world_size",
    "init_distributed",
    "is_initialized",
    "phase",
    "shutdown",
    "split_axis",
    "start_sum",
    "transport_for",
    "world_axis",
]
