"""Flags become a run: defaults, precedence, earlier runs, and one clear message for each mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from craken.checkpoint import place_of
from craken.train.arguments import Resume, build_parser, flags_to_keep, parse, resolve, save_given
from tests.unit.checkpoint.ranks import save_one


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)


def _resolve(*argv: str, has_accelerator: bool = False):
    return resolve(parse(list(argv)), has_accelerator=has_accelerator)


def test_the_default_run_is_the_small_model_with_zero_2_in_bf16() -> None:
    options = _resolve()
    assert (options.model, options.zero, options.precision, options.accumulation_steps) == ("small", 2, "bf16", 8)
    assert options.data is None
    assert options.output == Path("runs/small-zero2")
    assert options.cache == Path("runs/.craken_cache")


def test_flags_win_over_the_preset() -> None:
    options = _resolve("--model", "tiny", "--steps", "7", "--seq-len", "16", "--micro-batch", "3", "--lr", "0.5")
    assert (options.steps, options.seq_len, options.micro_batch_size, options.lr) == (7, 16, 3, 0.5)


def test_accelerators_take_larger_micro_batches() -> None:
    assert _resolve(has_accelerator=True).micro_batch_size == 8 * _resolve().micro_batch_size


def test_stage_and_precision_come_from_the_file_unless_flags_say_otherwise(tmp_path) -> None:
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 1}, "fp16": {"enabled": True}}))
    assert (_resolve("--config", "ds.json").zero, _resolve("--config", "ds.json").precision) == (1, "fp16")
    given = _resolve("--config", "ds.json", "--zero", "0", "--precision", "fp32")
    assert (given.zero, given.precision) == (0, "fp32")


def test_a_default_output_never_overwrites_a_run(tmp_path) -> None:
    (tmp_path / "runs/small-zero2").mkdir(parents=True)
    assert _resolve().output == Path("runs/small-zero2-2")


def test_a_run_goes_on_with_its_own_flags_and_those_given_now(tmp_path) -> None:
    (tmp_path / "text").mkdir()
    first = _resolve("--model", "tiny", "--data", "text", "--steps", "9", "--output", "run")
    first.output.mkdir()
    save_given(first, num_ranks=2, batch_size=32)
    again = _resolve("--resume", "run", "--steps", "12")
    assert (again.model, again.steps, again.ranks, again.resume) == ("tiny", 12, 2, Resume.ALWAYS)
    assert again.data == tmp_path / "text"  # absolute: resuming works from another folder
    assert again.output == Path("run")
    assert _resolve("--output", "run", "--resume").output == Path("run")


def test_a_run_gone_on_with_keeps_the_size_of_its_steps_unless_accumulation_is_given(tmp_path) -> None:
    first = _resolve("--model", "tiny", "--accumulation", "4", "--output", "run")
    assert first.kept_batch_size is None
    first.output.mkdir()
    save_given(first, num_ranks=2, batch_size=16)
    assert _resolve("--resume", "run", "--ranks", "1").kept_batch_size == 16
    assert _resolve("--output", "run", "--resume", "auto").kept_batch_size == 16
    other = _resolve("--resume", "run", "--accumulation", "4")
    assert (other.kept_batch_size, other.accumulation_steps) == (None, 4)
    assert "train_batch_size" not in other.given


def test_auto_begins_in_a_folder_that_stays_the_same_and_goes_on_with_its_flags(tmp_path) -> None:
    argv = ("--model", "tiny", "--zero", "1", "--resume", "auto")
    first = _resolve(*argv, "--seed", "3")
    assert (first.output, first.resume) == (Path("runs/tiny-zero1"), Resume.IF_POSSIBLE)
    first.output.mkdir(parents=True)
    (first.output / "metrics.jsonl").write_text("")  # killed before its first checkpoint: no reason to refuse
    assert _resolve(*argv).output == first.output
    save_given(first, num_ranks=2, batch_size=32)
    again = _resolve(*argv, "--steps", "9")
    assert (again.output, again.seed, again.ranks, again.steps) == (first.output, 3, 2, 9)
    assert _resolve("--output", "run", "--resume", "auto").output == Path("run")
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    assert _resolve("--config", "ds.json", "--resume", "auto").output == Path("runs/small-zero3")


def test_checkpoints_lie_in_the_output_unless_said_otherwise(tmp_path) -> None:
    assert _resolve("--output", "run").checkpoints == Path("run/checkpoints")
    assert _resolve("--checkpoints", "disk").checkpoints == Path("disk")
    first = _resolve("--checkpoints", "memory://bucket/notes/", "--cache", "file:///cache", "--output", "run")
    assert first.checkpoints == place_of("memory://bucket/notes")
    first.output.mkdir()
    save_given(first, num_ranks=2, batch_size=32)
    again = _resolve("--resume", "run")
    assert (again.checkpoints, again.cache) == (first.checkpoints, Path("/cache"))


@pytest.mark.parametrize("where", ["disk", "memory://bucket/notes"])
def test_a_checkpoint_tells_the_flags_where_the_output_is_gone(where) -> None:
    first = _resolve("--model", "tiny", "--data", "text", "--checkpoints", where, "--steps", "9", "--output", "run")
    flags = flags_to_keep(first, num_ranks=2, batch_size=16)
    save_one(where, "step1", {}, shared_state={"client": {"flags": flags}})
    again = _resolve("--checkpoints", where, "--output", "new", "--resume", "auto")
    assert (again.output, again.resume, str(again.checkpoints)) == (Path("new"), Resume.IF_POSSIBLE, where)
    assert (again.model, again.steps, again.ranks, again.kept_batch_size) == ("tiny", 9, 2, 16)
    again = _resolve("--resume", where, "--steps", "12")
    assert (again.output, again.resume, again.steps) == (Path("run"), Resume.ALWAYS, 12)
    assert again.checkpoints == first.checkpoints
    with pytest.raises(ValueError, match=f"{where} already holds checkpoints; go on"):
        _resolve("--checkpoints", where)


def test_flags_come_from_the_newest_checkpoint_that_can_be_read() -> None:
    for step in (1, 2):
        first = _resolve("--model", "tiny", "--checkpoints", f"other{step}", "--steps", str(step), "--output", "run")
        flags = flags_to_keep(first, num_ranks=2, batch_size=16)
        save_one(Path("disk"), f"step{step}", {}, shared_state={"client": {"flags": flags}})
    argv = ("--checkpoints", "disk", "--output", "new", "--resume", "auto")
    assert _resolve(*argv).steps == 2
    Path("disk/step2/index.json").write_text("{}")
    assert (_resolve(*argv).steps, _resolve(*argv).model) == (1, "tiny")
    Path("disk/latest").unlink()  # a save was killed before it wrote the first one
    assert _resolve(*argv).steps == 1
    with pytest.raises(ValueError, match="disk already holds checkpoints; go on"):
        _resolve("--checkpoints", "disk")


def test_home_is_the_same_folder_now_and_when_going_on(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    first = _resolve("--checkpoints", "~/disk", "--output", "run")
    assert first.checkpoints == tmp_path / "home" / "disk"
    assert flags_to_keep(first, num_ranks=1, batch_size=8)["checkpoints"] == str(first.checkpoints)


MISTAKES = [
    (["--checkpoints", "ftp://127.0.0.1:1/out"], "cannot look for an earlier run: .*refused; check --checkpoints"),
    (["--resume", "nowhere"], "no run of craken train there"),
    (["--resume"], "write --resume DIR"),
    (["--resume", "memory://bucket/none"], "memory://bucket/none: no checkpoint of a run there"),
    (["--output", "memory://bucket/out"], "write --checkpoints memory://bucket/out beside an --output of this host"),
    (["--config", "missing.json"], r"--config missing\.json does not exist"),
    (["--config", "settings"], r"--config settings is a folder; expected a JSON file such as settings/zero3\.json"),
    (["--config", "old"], r"--config old is a folder; expected a JSON file such as configs/ds_zero2_config\.json"),
    (["--config", "broken.json"], "is not JSON"),
    (["--config", "list.json"], "holds a list; expected a JSON object"),
    (["--output", "old"], "already holds a run.*--resume old"),
]


@pytest.mark.parametrize(("argv", "words"), MISTAKES, ids=[words for _, words in MISTAKES])
def test_a_mistake_is_told_with_what_to_type(tmp_path, argv, words) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "settings").mkdir()
    (tmp_path / "settings" / "zero3.json").write_text("{}")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=words):
        _resolve(*argv)


BAD_FLAGS = [
    (["--steps", "0"], "--steps: expected a whole number of at least 1, got '0'"),
    (["--lr", "-1"], "--lr: expected a number above 0, got '-1'"),
    (["--lr", "fast"], "--lr: expected a number above 0, got 'fast'"),
    (["--zero", "4"], "--zero: invalid choice: 4"),
    (["--vocab-size", "12"], "--vocab-size: expected a whole number of at least 257, got '12'"),
    (["--bogus"], "unrecognized arguments: --bogus"),
]


@pytest.mark.parametrize(("argv", "words"), BAD_FLAGS, ids=[words for _, words in BAD_FLAGS])
def test_a_bad_flag_ends_with_code_2_and_one_line(capsys, argv, words) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(argv)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_help_shows_every_flag_in_a_group_with_examples() -> None:
    text = build_parser().format_help()
    for word in ("--zero", "--config", "--model", "--data", "--steps", "--resume", "examples:", "default:"):
        assert word in text
