"""Runs several implementations of the training step in turn, round after round, and prints medians and ratios.

    python benchmarks/compare.py ddp fsdp2:2 craken:0 craken:1 craken:2 --dtype bf16 --rounds 3
    python benchmarks/compare.py ddp original:2 craken:2 --original PYTHON --ranks 4 --accumulation 4

Rounds interleave, so that a busy minute of the machine falls on all. `x first`, and `cpu x` of CPU time, is the
median over rounds of the ratio to the first case in the same round, as machines change their speed between rounds.
`--json` adds the rows as one line for a program to read. All else goes to train_step.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.ranks import run_on_ranks
from benchmarks.train_step import over_ranks, parse, variables_of

SCRIPT = str(Path(__file__).with_name("train_step.py"))
COLUMNS = ("step_ms", "min_ms", "cpu_ms", "peak_mb")
RATIOS = ("step_ms", "cpu_ms")


def run_once(case: str, python: str, extra: list[str]) -> dict[str, Any]:
    command = [python, SCRIPT, case, *extra]
    options = parse([case, *extra])
    return over_ranks(run_on_ranks(command, options.ranks, variables=variables_of(options)))


Round = dict[str, dict[str, Any]]  # what each case that ran gave


def row_of(case: str, first: str, rounds: list[Round]) -> dict[str, Any]:
    """Return a case's medians over rounds, and those of its ratios to the first case in the same round."""
    runs = [found[case] for found in rounds if case in found]
    row = {key: statistics.median(run[key] for run in runs) for key in COLUMNS}
    for key in RATIOS:
        ratios = [found[case][key] / found[first][key] for found in rounds if case in found and first in found]
        row[f"{key}_ratio"] = statistics.median(ratios) if ratios else None
    return row | {"losses": runs[0]["losses"]}


def shown(ratio: float | None) -> str:
    return f"{'-':>8}" if ratio is None else f"{ratio:8.2f}"


def table(rows: dict[str, dict[str, Any]]) -> str:
    heads = f"{'step ms':>9} {'x first':>8} {'min ms':>8} {'cpu ms':>8} {'cpu x':>8} {'peak MB':>8}"
    lines = [f"{'case':14} {heads}   losses: first, second, last"]
    for case, row in rows.items():
        losses = " ".join(f"{loss:.5f}" for loss in (*row["losses"][:2], row["losses"][-1]))
        lines.append(
            f"{case:14} {row['step_ms']:9.0f} {shown(row['step_ms_ratio'])} {row['min_ms']:8.0f} "
            f"{row['cpu_ms']:8.0f} {shown(row['cpu_ms_ratio'])} {row['peak_mb']:8.0f}   {losses}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--original", metavar="PYTHON", help="a Python that has the original, for `original:STAGE`")
    parser.add_argument("--json", action="store_true")
    options, extra = parser.parse_known_args()
    if len({*options.cases}) < len(options.cases):
        parser.error("a case is given twice; each runs once a round")
    if options.original is None and any(case.startswith("original") for case in options.cases):
        parser.error("`original:STAGE` needs --original PYTHON: a Python in which the original is installed")
    rounds: list[Round] = []
    for _ in range(options.rounds):
        rounds.append({})
        for case in options.cases:
            python = options.original if case.startswith("original") else sys.executable
            try:
                run = run_once(case, python, extra)
                rounds[-1][case] = run
                print(f"{case} {run['step_ms']:.0f} ms {run['peak_mb']:.0f} MB", file=sys.stderr, flush=True)
            except RuntimeError as error:
                print(f"{case} failed: {error}", file=sys.stderr, flush=True)
    ran = [case for case in options.cases if any(case in found for found in rounds)]
    rows = {case: row_of(case, ran[0], rounds) for case in ran}
    if not rows:
        sys.exit("no case ran")
    print(table(rows))
    if options.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
