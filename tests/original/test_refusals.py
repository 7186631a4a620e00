"""What cannot be imported is refused by one message that names the file, before anything is written."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from craken import cli
from craken.checkpoint import CheckpointDamaged, CheckpointNotFound, Reader
from craken.checkpoint.original.files import read_original
from craken.checkpoint.original.importing import import_original
from tests.original.test_resume import names_of, unpack

TAG = "global_step5"
MODEL = "mp_rank_00_model_states.pt"


def optimizer_file(rank: int) -> str:
    return f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def refused(folder: Path, error: type[Exception], text: str, **options: Any) -> None:
    """Check that importing `folder` fails with `error`, that its message has `text`, and that nothing was written."""
    out = folder.parent / "out"
    with pytest.raises(error) as caught:
        import_original(folder, out, **options)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not out.exists()


def change(file: Path, edit: Any) -> None:
    """Load a file as the original would write it, edit its content, write it back."""
    content = torch.load(file, weights_only=False)
    edit(content)
    torch.save(content, file)


@pytest.mark.parametrize("num_lost", [1, 100, 5000])
def test_a_file_cut_short_is_named(tmp_path, num_lost) -> None:
    folder = unpack("fp32-stage2", tmp_path)
    file = folder / TAG / optimizer_file(1)
    os.truncate(file, file.stat().st_size - num_lost)
    refused(folder, CheckpointDamaged, f"{file} is damaged")


@pytest.mark.parametrize("name", ["fp32-stage0", "fp32-stage1", "fp32-stage3", "universal-stage1"])
def test_a_flipped_bit_in_the_bytes_of_a_tensor_is_found_in_every_file(tmp_path, name) -> None:
    folder = unpack(name, tmp_path)
    for file in sorted(folder.rglob("*.pt")):
        whole = bytearray(file.read_bytes())
        with zipfile.ZipFile(file) as archive:
            records = [info for info in archive.infolist() if "/data/" in info.filename and info.file_size]
        for info in records[-1:]:
            name_and_extra = whole[info.header_offset + 26 : info.header_offset + 30]
            start = info.header_offset + 30 + sum(np.frombuffer(name_and_extra, np.uint16))
            whole[start + info.file_size // 2] ^= 4
            file.write_bytes(whole)
            refused(folder, CheckpointDamaged, f"{file} is damaged", names=names_of(name))
            whole[start + info.file_size // 2] ^= 4
            file.write_bytes(whole)


@pytest.mark.parametrize(
    ("name", "gone", "error", "text"),
    [
        ("fp32-stage1", optimizer_file(0), CheckpointNotFound, f"{optimizer_file(0)} is missing"),
        ("fp32-stage1", optimizer_file(1), ValueError, "saved by 2 ranks and has optimizer files of 1"),
        ("fp32-stage1", MODEL, CheckpointNotFound, f"lacks {MODEL}"),
        ("fp32-stage3", optimizer_file(1), CheckpointNotFound, "model files of 2 ranks and optimizer files of 1"),
        ("universal-stage3", "zero/up.weight/fp32.pt", CheckpointNotFound, "up.weight/fp32.pt is missing"),
    ],
)
def test_a_missing_file_is_named(tmp_path, name, gone, error, text) -> None:
    folder = unpack(name, tmp_path)
    next(folder.glob(f"global*/{gone}")).unlink()
    refused(folder, error, text)


def test_missing_optimizer_files_are_not_taken_for_stage_0(tmp_path) -> None:
    folder = unpack("fp32-stage1", tmp_path)
    for rank in range(2):
        (folder / TAG / optimizer_file(rank)).unlink()
    refused(folder, CheckpointDamaged, "the optimizer files (*_optim_states.pt) are missing")


def test_files_of_another_number_of_ranks_are_refused(tmp_path) -> None:
    folder = unpack("fp32-stage1", tmp_path)
    shutil.copy(folder / TAG / optimizer_file(1), folder / TAG / optimizer_file(2))
    refused(folder, ValueError, "saved by 2 ranks and has optimizer files of 3")
    change(folder / TAG / MODEL, lambda content: content.update(dp_world_size=3))
    refused(folder, ValueError, "is one of [2, 2] parts, but there are 3 optimizer files")


def test_two_kinds_of_files_in_one_folder_are_refused(tmp_path) -> None:
    folder = unpack("fp32-stage1", tmp_path)
    shutil.copy(folder / TAG / optimizer_file(1), folder / TAG / f"bf16_{optimizer_file(1)}")
    refused(folder, ValueError, "remove what is stale")
    shutil.copytree(unpack("fp32-stage3", tmp_path / "other") / TAG, folder / TAG, dirs_exist_ok=True)
    (folder / TAG / f"bf16_{optimizer_file(1)}").unlink()
    refused(folder, ValueError, "two checkpoints in one folder")


def test_parts_of_models_are_refused(tmp_path) -> None:
    folder = unpack("fp32-stage1", tmp_path)
    for name, text in (
        ("mp_rank_01_model_states.pt", "split by tensor parallelism (mp_rank 01)"),
        ("layer_03-model_00-model_states.pt", "of a pipeline stage or of experts"),
        ("layer_0_expert_1_mp_rank_00_model_states.pt", "of a pipeline stage or of experts"),
    ):
        shutil.copy(folder / TAG / MODEL, folder / TAG / name)
        refused(folder, NotImplementedError, text)
        (folder / TAG / name).unlink()


def test_folders_and_tags_that_are_not_there_are_named(tmp_path) -> None:
    folder = unpack("fp32-stage1", tmp_path)
    refused(folder / "nowhere", CheckpointNotFound, "does not exist")
    refused(
        folder,
        CheckpointNotFound,
        f"'global_step7' does not exist in {folder}; checkpoints in it: {TAG}",
        tag="global_step7",
    )
    (folder / "latest").write_text("global_step9")
    refused(folder, CheckpointNotFound, "names the tag 'global_step9'")
    (folder / "latest").unlink()
    refused(folder, CheckpointNotFound, f"give --tag; checkpoints in it: {TAG}")
    (tmp_path / "empty" / "tag").mkdir(parents=True)
    refused(tmp_path / "empty", CheckpointNotFound, f"holds no {MODEL}: it is no checkpoint of the original", tag="tag")


def test_the_folder_of_a_tag_can_be_named_itself(tmp_path) -> None:
    folder = unpack("fp32-stage1", tmp_path)
    for source, tag in ((folder / TAG, None), (folder, TAG)):
        out = tmp_path / f"out-{tag}"
        assert import_original(source, out, tag).path == out / TAG
        assert Reader(out).tag == TAG


def test_what_exists_and_what_is_ours_is_left_alone(tmp_path) -> None:
    folder, out = unpack("fp32-stage1", tmp_path), tmp_path / "ours"
    import_original(folder, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match="exists, nothing is overwritten"):
        import_original(folder, out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    with pytest.raises(FileExistsError, match="exists, nothing is overwritten"):
        import_original(folder, folder)
    refused(out, ValueError, "is a checkpoint of ours already")
    (out / "latest").unlink()
    refused(out, ValueError, f"holds checkpoints of ours already ({TAG})")
    out.rename(tmp_path / "checkpoints")  # as `craken train` leaves them in its folder
    (tmp_path / "checkpoints" / "latest").write_text(TAG)
    with pytest.raises(ValueError, match=rf"holds checkpoints of ours already \({TAG}\)"):
        import_original(tmp_path, tmp_path / "new")


class _Runs:
    """Makes a pickle that would create a file when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def test_a_pickle_that_names_a_function_is_refused_and_not_run(tmp_path) -> None:
    folder = unpack("fp32-stage1", tmp_path)
    file = folder / TAG / MODEL
    change(file, lambda content: content.update(note=_Runs(tmp_path / "ran")))
    refused(folder, ValueError, f"{file} names {os.system.__module__}.system")
    assert not (tmp_path / "ran").exists()


def test_classes_of_the_client_state_are_refused_by_name(tmp_path) -> None:
    folder = unpack("fp32-stage1", tmp_path)
    change(folder / TAG / MODEL, lambda content: content.update(args=Path("a")))
    refused(folder, ValueError, "take it out of the client state")


def test_files_that_torch_did_not_save_are_named(tmp_path) -> None:
    folder = unpack("fp32-stage1", tmp_path)
    file = folder / TAG / MODEL
    file.write_bytes(b"not a zip file")
    refused(folder, CheckpointDamaged, f"{file} is damaged")
    torch.save([1, 2], file)
    refused(folder, ValueError, f"{file} holds no engine's state")


def test_a_tensor_stays_in_its_file_until_it_is_asked_for(tmp_path) -> None:
    folder = unpack("fp32-stage3", tmp_path)
    file = folder / TAG / optimizer_file(0)
    masters = read_original(file)["optimizer_state_dict"]["fp32_flat_groups"][0]
    with Path("/proc/self/maps").open() as maps:
        assert any(line.rstrip().endswith(str(file)) and _spans(line, masters.data_ptr()) for line in maps)


def _spans(line: str, address: int) -> bool:
    low, high = (int(end, 16) for end in line.split()[0].split("-"))
    return low <= address < high


def test_states_without_names_need_them_where_shapes_leave_it_open(tmp_path) -> None:
    folder = unpack("fp32-stage0", tmp_path)
    refused(folder, ValueError, "leaves open whose the optimizer's states are; give --groups FILE")
    (names,) = names_of("fp32-stage0") or []
    refused(
        folder, ValueError, "names what; the checkpoint's parameters are embed.weight", names=[[*names[1:], "what"]]
    )
    refused(folder, ValueError, "groups have [7] parameters, those named [6]", names=[names[1:]])
    refused(folder, ValueError, "names up.bias twice", names=[[*names, "up.bias"]])
    refused(folder, ValueError, "has shape (11, 6), the parameter (10, 6)", names=[[names[1], names[0], *names[2:]]])


def test_equal_weights_at_stage_0_need_names_if_one_of_them_is_not_trained(tmp_path) -> None:
    folder = unpack("bf16-stage0", tmp_path)

    def make_equal(content: dict[str, Any]) -> None:
        content["module"]["frozen.bias"].copy_(content["module"]["up.bias"])

    change(folder / TAG / MODEL, make_equal)
    refused(folder, ValueError, "leave open whose the states of frozen.bias are; give --groups FILE")
    matrices, vectors = (
        ["embed.weight", "up.weight", "down.weight"],
        ["up.bias", "down.bias", "norm.weight", "norm.bias"],
    )
    out = tmp_path / "out"
    import_original(folder, out, names=[matrices, vectors])
    assert Reader(out).names("frozen") == ["frozen.weight", "frozen.bias"]


def test_files_of_two_saves_are_refused(tmp_path) -> None:
    folder = unpack("bf16-stage2", tmp_path)
    change(folder / TAG / MODEL, lambda content: content["module"]["up.bias"].add_(1))
    refused(
        folder, ValueError, "the masters of up.bias and others, rounded, do not equal the weights in the model file"
    )
    folder = unpack("universal-stage1", tmp_path / "universal")
    change(folder / f"{TAG}_universal" / MODEL, lambda content: content["module"]["up.bias"].add_(1))
    refused(folder, ValueError, "the masters of up.bias, rounded, do not equal the weights")
    folder = unpack("fp32-stage3", tmp_path / "by-parameter")
    file = folder / TAG / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    change(file, lambda content: content["param_shapes"].pop())
    refused(folder, ValueError, "has 3 flat tensors, the model file tells of 2")


def test_masters_that_do_not_fit_the_weights_are_refused(tmp_path) -> None:
    folder = unpack("fp16-stage0", tmp_path)
    change(folder / TAG / MODEL, lambda content: content["module"]["down.weight"].add_(1))
    refused(folder, ValueError, "the masters from element 126 of 186 on, rounded, equal none of the weights")


def test_the_command_says_what_it_did_and_ends_with_2_where_it_cannot(tmp_path, caplog) -> None:
    folder, out, groups = unpack("fp32-stage0", tmp_path), tmp_path / "out", tmp_path / "groups.json"
    from craken.log import logger

    logger.addHandler(caplog.handler)
    try:
        assert cli.main(["import", str(folder), str(out)]) == 2
        assert "leaves open whose" in caplog.text
        groups.write_text('{"a": 1}')
        assert cli.main(["import", str(folder), str(out), "--groups", str(groups)]) == 2
        assert "expected a JSON list" in caplog.text
        groups.write_text(json.dumps(names_of("fp32-stage0")))
        assert cli.main(["import", str(folder), str(out), "--groups", str(groups)]) == 0
        assert "step 5, 7 trained and 2 frozen parameters, optimizer states exp_avg, exp_avg_sq" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)
