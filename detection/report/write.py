"""Writes the report: report.html, the same as report.md, tables as CSV, figures as PNG and SVG."""

import base64
import shutil
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from omegaconf import DictConfig
from tqdm import tqdm

from roi_quantization.detection.files import atomic_write
from roi_quantization.detection.report import prose
from roi_quantization.detection.report.figures import Drawing, all_drawings
from roi_quantization.detection.report.findings import Findings
from roi_quantization.detection.report.origin import commit, read_origin, versions
from roi_quantization.detection.report.style import DARK, LIGHT, rendered
from roi_quantization.detection.report.sweep import Sweep, read_sweep
from roi_quantization.detection.report.tables import Table, all_tables

WITH_NUMBERS = {"differences", "localisation", "sizes", "misalignment", "cross"}  # figures that have a table of the same name


@dataclass(frozen=True)
class Section:
    """A figure for light and for dark ground, as data: URIs, and the table with its numbers where there is one."""

    drawing: Drawing
    light: str
    dark: str
    table: Table | None


def write_report(folder: Path | str, reference: str = "align") -> Path:
    """Writes `<folder>/report/` on the finished runs of a sweep, and returns the path of report.html.

    Args:
        folder: of the sweep, see `roi_quantization.detection.report.sweep`.
        reference: the arm that others are held against; the first that has finished runs where this one has none.
    Raises:
        ValueError: no run is finished, or a file of a run cannot be read; the message names it.
    """
    planned = [run for start in read_origin(folder)[-1:] for run in start["runs"]]
    sweep = read_sweep(folder, arms=[arm for arm, _ in planned], seeds=[seed for _, seed in planned])
    found = Findings(sweep, reference)
    out = sweep.folder / "report"
    tables, drawings = all_tables(found), all_drawings(found)
    for name in ("tables", "figures"):
        shutil.rmtree(out / name, ignore_errors=True)  # of an earlier report, which may have had others
    for table in tables.values():
        atomic_write(out / "tables" / f"{table.name}.csv", table.csv.encode())
    sections = []
    for drawing in tqdm(drawings, desc="drawing", unit="figure", leave=False):
        for kind in ("png", "svg"):
            atomic_write(out / "figures" / f"{drawing.name}.{kind}", rendered(drawing.draw, LIGHT, kind))
        light, dark = (_uri(rendered(drawing.draw, theme, "svg", transparent=True)) for theme in (LIGHT, DARK))
        sections.append(Section(drawing, light, dark, tables.get(drawing.name) if drawing.name in WITH_NUMBERS else None))
    content = {
        "title": "What does quantizing RoI coordinates cost?",
        "subtitle": f"{_count(found.arms, 'operator')}, {_count(found.seeds, 'seed')}, {_count(sweep.finished, 'finished run')}",
        "result": prose.result(found),
        "explanation": prose.explanation(found),
        "tables": tables,
        "sections": sections,
        "problems": _problems(sweep, found, reference),
        "made_from": _made_from(found),
    }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=lambda name: name.endswith(".html.jinja"), undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    for name in ("report.md", "report.html"):
        atomic_write(out / name, environment.get_template(f"{name}.jinja").render(content).encode())
    return out / "report.html"


def _count(things: Sized, what: str) -> str:
    return f"{len(things)} {what}{'s' * (len(things) != 1)}"


def _uri(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def _problems(sweep: Sweep, found: Findings, reference: str) -> list[str]:
    """What a reader must know before trusting the numbers."""
    problems = [f"{run.arm}, seed {run.seed}: failed. {run.error.strip().splitlines()[-1]}" for run in sweep.failed]
    problems += [f"{arm}, seed {seed}: not finished." for arm, seed in sweep.missing]
    if found.reference != reference:
        problems.append(f"There is no finished run of {reference}: the others are held against {found.reference}.")
    if found.over == "images":
        problems.append("There is one seed: intervals are over images and say nothing of how training varies.")
    return problems


def _made_from(found: Findings) -> list[tuple[str, str]]:
    """Data, settings, software and command: (what, which)."""
    run = found.sweep.finished[0]
    config, starts = run.config, read_origin(found.sweep.folder)
    data = starts[-1]["data"] if starts else {}
    truth = found.sweep.annotations
    evaluated = f"{len(truth.imgs)} images, {len(truth.anns)} objects of {len(truth.cats)} categories"
    facts = [("data", str(config.data.root)), *((f"data: {split}", words) for split, words in data.items())]
    facts += [("evaluated on", evaluated), ("stride", f"{found.stride} pixels a cell"), ("seeds", ", ".join(map(str, found.seeds)))]
    facts += [("training", _training([run.config for run in found.sweep.finished]))]
    commits = dict.fromkeys(start["commit"] for start in starts) or [f"{commit()} (of this report; the sweep's was not written down)"]
    used = starts[-1]["versions"] if starts else versions()
    facts += [("commit", ", ".join(commits)), ("versions", ", ".join(f"{name} {number}" for name, number in used.items()))]
    if starts:
        facts += [("machine", starts[-1]["machine"]), ("started", starts[0]["time"])]
        facts += [("command", command) for command in dict.fromkeys(start["command"] for start in starts)]
    return [*facts, ("report", date.today().isoformat())]


def _training(configs: Sequence[DictConfig]) -> str:
    """Length, batch and rate, each with all the values that runs had."""

    def values(*of_runs: str) -> str:
        return " or ".join(dict.fromkeys(of_runs))

    limits = [(c.trainer.get("max_epochs") or -1, c.trainer.get("max_steps") or -1) for c in configs]
    length = values(*(f"{epochs} epochs" if steps < 0 else f"{steps} steps" for epochs, steps in limits))
    images = values(*(str(c.data.batch_size) for c in configs))
    rate = values(*(f"{c.optim.groups.lr:g}" for c in configs))
    alike = ", the same for all" if " or " not in length + images + rate else ""
    return f"{length} of {images} images a step, rate {rate}{alike}"
