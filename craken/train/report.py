"""Writes `report.html`: one self-contained page with a run's curves, its settings and a sample of what it learnt."""

from __future__ import annotations

import html
import statistics
import string
import time
from functools import cache
from importlib.resources import files
from pathlib import Path

from craken.train.charts import Chart, Series, finite, render, smooth
from craken.train.huggingface import Completion
from craken.train.metrics import EvalMetrics, MetricsFile, StepMetrics

SETTLING_STEPS = 3  # the first steps allocate and compile: left out of the median throughput
SMOOTHED_PARTS = 25  # a running mean spans one of these
WIDE = 960


def write_report(path: Path, metrics: MetricsFile, facts: dict[str, str], completion: Completion | None) -> None:
    """Write the page for the metrics so far, whole or not at all."""
    page = _template().substitute(
        title=html.escape(f"{path.resolve().parent.name}"),
        subtitle=html.escape(
            f"{facts.get('model', '')} on {facts.get('ranks', '')}, ZeRO-{facts.get('ZeRO stage', '')}"
        ),
        date=time.strftime("%Y-%m-%d %H:%M"),
        tiles=_tiles(metrics.steps, metrics.evals),
        loss=render(_loss_chart(metrics.steps, metrics.evals)),
        throughput=render(_chart(metrics.steps, "tokens/s", "tokens_per_s", is_noisy=True, digits=0)),
        memory=render(_memory_chart(metrics.steps)),
        sent=render(_chart(metrics.steps, "MB sent", "sent_bytes", scale=1e-6)),
        rate=render(_chart(metrics.steps, "learning rate x 1000", "lr", scale=1e3, digits=3)),
        norm=render(_chart(metrics.steps, "gradient norm", "grad_norm", is_noisy=True)),
        step_time=render(_chart(metrics.steps, "seconds", "step_s", is_noisy=True)),
        completion=_completion(completion),
        facts="".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in facts.items()),
    )
    partial = path.with_name(path.name + ".partial")
    partial.write_text(page, "utf-8")
    partial.replace(path)


@cache
def _template() -> string.Template:
    return string.Template(files("craken.train").joinpath("report.html").read_text("utf-8"))


def _loss_chart(steps: list[StepMetrics], evals: list[EvalMetrics]) -> Chart:
    train = finite([(row.step, row.loss) for row in steps])
    window = max(1, len(train) // SMOOTHED_PARTS)
    lines = [Series("training", train, "train-raw")]
    if window > 1:
        lines.append(Series("training, smoothed", smooth(train, window), "train"))
    lines.append(Series("validation", [(row.step, row.val_loss) for row in evals], "validation", has_dots=True))
    levels = [("unigram entropy", evals[-1].unigram_entropy)] if evals else []
    return Chart(lines, width=WIDE, height=360, levels=levels, starts_at_zero=False)


def _memory_chart(steps: list[StepMetrics]) -> Chart:
    now = [(float(row.step), row.memory_bytes / 2**30) for row in steps]
    peak = [(float(row.step), row.peak_memory_bytes / 2**30) for row in steps]
    return Chart([Series("peak GiB", peak, "second"), Series("GiB", now, "line")])


def _chart(
    steps: list[StepMetrics], name: str, field: str, *, scale: float = 1.0, is_noisy: bool = False, digits: int = 2
) -> Chart:
    values = [(float(row.step), getattr(row, field)) for row in steps]
    points = [(x, y * scale) for x, y in finite(values)]
    lines = [Series(name, points, "line")]
    window = len(points) // SMOOTHED_PARTS
    if is_noisy and window > 1:
        lines = [Series(name, points, "second"), Series("smoothed", smooth(points, window), "line")]
    return Chart(lines, digits=digits)


def _tiles(steps: list[StepMetrics], evals: list[EvalMetrics]) -> str:
    tiles: list[tuple[str, str, str]] = []
    if evals:
        last = evals[-1]
        tiles.append(("validation loss", f"{last.val_loss:.3f}", "nats a token, held-out files"))
        gap = last.unigram_entropy - last.val_loss
        tiles.append(("under unigram", f"{gap:.2f}", f"nats; frequencies alone reach {last.unigram_entropy:.2f}"))
    if steps:
        speed = statistics.median(row.tokens_per_s for row in steps[SETTLING_STEPS:] or steps)
        tiles.append(("throughput", f"{speed:,.0f}", "tokens a second, median step"))
        peak = max(row.peak_memory_bytes for row in steps)
        tiles.append(("peak memory", f"{peak / 2**30:.2f}", "GiB on the first rank"))
        sent = statistics.median(row.sent_bytes for row in steps)
        tiles.append(("sent", f"{sent / 1e6:.1f}", "MB a step and rank"))
        tokens, minutes = steps[-1].tokens, steps[-1].elapsed_s / 60
        tiles.append(("trained", f"{minutes:.1f}", f"minutes, {steps[-1].step} steps, {tokens / 1e6:.2f} M tokens"))
    return "".join(
        f'<div class="tile"><h3>{name}</h3><p class="value">{value}</p><p class="unit">{unit}</p></div>'
        for name, value, unit in tiles
    )


def _completion(completion: Completion | None) -> str:
    if completion is None:
        return ""
    prompt, text = html.escape(completion.prompt), html.escape(completion.text)
    return (
        "<section><h2>What it writes</h2><p>The saved model, loaded back, continues the grey lines (temperature "
        f'0.5).</p><pre><span class="prompt">{prompt}</span>{text}</pre></section>'
    )
