"""Finds the files of a checkpoint that the original wrote, and says what is missing before any is read.

SAVE_DIR/latest, latest_universal                     one tag each
SAVE_DIR/TAG/mp_rank_00_model_states.pt               weights, progress, client state; the optimizer at stage 0
SAVE_DIR/TAG/zero_pp_rank_{r}_mp_rank_00_model_states.pt    the same at stage 3, a file a rank
SAVE_DIR/TAG/[bf16_]zero_pp_rank_{r}_mp_rank_00_optim_states.pt    masters and optimizer, a file a rank
SAVE_DIR/TAG/zero/PARAMETER/fp32.pt, exp_avg.pt, ...        instead of those in a universal checkpoint
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from craken.checkpoint.consolidated import locate
from craken.checkpoint.errors import CheckpointNotFound
from craken.checkpoint.folder import list_tags
from craken.checkpoint.index import INDEX_NAME

_RANK_FILE = re.compile(
    r"(?P<prefix>(?:bf16_|fp16_)?)zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<mp>\d+)_(?P<what>model|optim)_states\.pt"
)
_MODEL_FILE = re.compile(r"mp_rank_(?P<mp>\d+)_model_states\.pt")
_PIPELINE_OR_EXPERT_FILE = re.compile(r"layer_\d+.*\.pt|expp_rank_.*\.pt|.*_expert_.*\.pt")
_NOTHING_TO_DO = "load them as they are, there is nothing to import"
_LATEST_NAMES = ("latest", "latest_universal")
_UNIVERSAL_FOLDER, _WHOLE_MODEL = "zero", "mp_rank_00_model_states.pt"


@dataclass(frozen=True)
class OriginalFolder:
    """The files of one checkpoint, in order of ranks."""

    path: Path
    tag: str
    model_files: tuple[Path, ...]  # one, or at stage 3 one a rank
    optimizer_files: tuple[Path, ...]  # one a rank; none at stage 0 and in a universal checkpoint
    universal: Path | None  # the folder with a folder for each parameter

    @property
    def is_cut_by_parameter(self) -> bool:
        """Whether it is of stage 3: each rank's model file holds its part of the frozen weights, and no others."""
        return self.model_files[0].name != _WHOLE_MODEL

    @property
    def files(self) -> tuple[Path, ...]:
        """All files that are read."""
        universal = () if self.universal is None else sorted(self.universal.rglob("*.pt"))
        return (*self.model_files, *self.optimizer_files, *universal)


def find_original(source: Path, tag: str | None) -> OriginalFolder:
    """Look up the checkpoint in `source` (a save folder, or a tag's own folder) and list its files.

    tag: None takes the one that `latest`, else `latest_universal` names. CheckpointNotFound for what is missing,
    ValueError for what cannot be read: split by tensor or pipeline parallelism, experts, ours already.
    """
    path = _tag_folder(source, tag)
    _refuse_others(path)
    model_files, optimizer_files = _model_files(path), _rank_files(path, "optim")
    universal = path / _UNIVERSAL_FOLDER
    if not model_files and not optimizer_files:
        raise CheckpointNotFound(f"{path} holds no {_WHOLE_MODEL}: it is no checkpoint of the original")
    if not model_files:
        raise CheckpointNotFound(f"{path} has optimizer files but lacks {_WHOLE_MODEL}: copy all its files")
    is_universal = universal.is_dir()
    if model_files[0].name != _WHOLE_MODEL and not is_universal and len(model_files) != len(optimizer_files):
        raise CheckpointNotFound(
            f"{path} has model files of {len(model_files)} ranks and optimizer files of {len(optimizer_files)}; "
            "expected one of each from every rank: copy all its files"
        )
    if is_universal and optimizer_files:
        raise ValueError(f"{path} holds both {_UNIVERSAL_FOLDER}/ and optimizer files of ranks; remove what is stale")
    return OriginalFolder(path, path.name, model_files, optimizer_files, universal if is_universal else None)


def _tag_folder(source: Path, tag: str | None) -> Path:
    if not source.is_dir():
        raise CheckpointNotFound(f"checkpoint folder {source} does not exist")
    if tag is not None:
        path = source / tag
        if not path.is_dir():
            raise CheckpointNotFound(f"tag {tag!r} does not exist in {source}; {_tags_in(source)}")
        return path
    if _looks_like_a_checkpoint(source):
        return source.resolve()
    for name in _LATEST_NAMES:
        if (source / name).is_file():
            tag = (source / name).read_text(encoding="utf-8", errors="replace").strip()
            if not tag or Path(tag).name != tag or not (source / tag).is_dir():
                raise CheckpointNotFound(
                    f"{source / name} names the tag {tag!r}, which does not exist; {_tags_in(source)}"
                )
            return source / tag
    own = list_tags(locate(source, None)[0])
    if own:
        raise ValueError(f"{source} holds checkpoints of ours already ({', '.join(own[-3:])}): {_NOTHING_TO_DO}")
    raise CheckpointNotFound(f"{source} has no file `latest`: give --tag; {_tags_in(source)}")


def _tags_in(source: Path) -> str:
    tags = sorted(path.name for path in source.iterdir() if path.is_dir() and _looks_like_a_checkpoint(path))
    return f"checkpoints in it: {', '.join(tags)}" if tags else "no checkpoint is in it"


def _looks_like_a_checkpoint(path: Path) -> bool:
    if (path / INDEX_NAME).is_file():
        return True
    return any(_RANK_FILE.fullmatch(file.name) or _MODEL_FILE.fullmatch(file.name) for file in path.iterdir())


def _refuse_others(path: Path) -> None:
    if (path / INDEX_NAME).is_file():
        raise ValueError(f"{path} is a checkpoint of ours already: {_NOTHING_TO_DO}")
    for file in sorted(path.iterdir()):
        match = _MODEL_FILE.fullmatch(file.name) or _RANK_FILE.fullmatch(file.name)
        if match and int(match["mp"]) > 0:
            raise NotImplementedError(
                f"{file} is of a model split by tensor parallelism (mp_rank {match['mp']}); only checkpoints with "
                "mp_rank_00 alone can be imported: merge the parts with the original's tools first"
            )
        if _PIPELINE_OR_EXPERT_FILE.fullmatch(file.name):
            raise NotImplementedError(
                f"{file} is of a pipeline stage or of experts; only data-parallel (ZeRO) checkpoints can be imported"
            )


def _model_files(path: Path) -> tuple[Path, ...]:
    whole = path / _WHOLE_MODEL
    by_rank = _rank_files(path, "model")
    if by_rank and whole.is_file():
        raise ValueError(f"{path} holds both {whole.name} and {by_rank[0].name}: two checkpoints in one folder")
    return (whole,) if whole.is_file() else by_rank


def _rank_files(path: Path, what: str) -> tuple[Path, ...]:
    """Return the files of ranks 0, 1, ... of a kind; CheckpointNotFound naming the first that is missing."""
    found: dict[int, Path] = {}
    for file in sorted(path.iterdir()):
        match = _RANK_FILE.fullmatch(file.name)
        if match and match["what"] == what:
            rank = int(match["rank"])
            if rank in found:
                raise ValueError(f"{path} holds both {found[rank].name} and {file.name}; remove what is stale")
            found[rank] = file
    for rank in range(len(found)):
        if rank not in found:
            name = next(iter(found.values())).name
            wanted = re.sub(r"pp_rank_\d+", f"pp_rank_{rank}", name)
            raise CheckpointNotFound(f"{path / wanted} is missing: copy all files of the checkpoint")
    return tuple(found[rank] for rank in sorted(found))
