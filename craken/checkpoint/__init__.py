"""One format for every topology: safetensors shards that each rank writes, and one JSON index with checksums."""

from craken.checkpoint.agreement import do_on_all, run_on_all
from craken.checkpoint.background import BackgroundSaver, Stall
from craken.checkpoint.clone import clone_tensors_for_torch_save
from craken.checkpoint.entry import Piece
from craken.checkpoint.errors import CheckpointDamaged, CheckpointNotFound
from craken.checkpoint.folder import latest_tag, list_tags
from craken.checkpoint.place import Place, place_of
from craken.checkpoint.reader import Reader, Wish
from craken.checkpoint.retention import newest_first, newest_whole
from craken.checkpoint.saver import Target, save
from craken.checkpoint.verifier import Damage, verify

__all__ = [
    "BackgroundSaver",
    "CheckpointDamaged",
    "CheckpointNotFound",
    "Damage",
    "Piece",
    "Place",
    "Reader",
    "Stall",
    "Target",
    "Wish",
    "clone_tensors_for_torch_save",
    "do_on_all",
    "latest_tag",
    "list_tags",
    "newest_first",
    "newest_whole",
    "place_of",
    "run_on_all",
    "save",
    "verify",
]
