"""Write the report: report.html, the same as report.md, tables as CSV, figures as PNG and SVG."""

import base64
import shutil
from collections.abc import Sequence, Sized
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from omegaconf import DictConfig
from tqdm import tqdm

from roi_quantization.detection.common.files import atomic_write
from roi_quantization.detection.report import prose
from roi_quantization.detection.report.figures import ReportFigure, make_figures
from roi_quantization.detection.report.findings import Findings
from roi_quantization.detection.report.origin import commit, read_origin, versions
from roi_quantization.detection.report.style import DARK, LIGHT, render
from roi_quantization.detection.report.sweep import Sweep, read_sweep
from roi_quantization.detection.report.tables import Table, make_tables

WITH_NUMBERS = {"differences", "localisation", "sizes", "misalignment", "predicted", "cross"}  # figures that have a table of the same name


@dataclass(frozen=True)
class Section:
    """A figure in the light and the dark theme as data: URIs, and the table with its numbers where there is one."""

    figure: ReportFigure
    light: str
    dark: str
    table: Table | None


def write_report(folder: Path | str, reference: str = "align") -> Path:
    """Write `<folder>/report/` from the finished runs of a sweep.

    Args:
        folder: of the sweep, see `roi_quantization.detection.report.sweep`.
        reference: the arm that others are compared with. Where it has no finished run, the first arm that has one.

    Returns:
        Path of report.html.

    Raises:
        ValueError: no run is finished, or a file of a run cannot be read. The message names it.
    """
    planned = [run for start in read_origin(folder)[-1:] for run in start["runs"]]
    sweep = read_sweep(folder, arms=[arm for arm, _ in planned], seeds=[seed for _, seed in planned])
    findings = Findings(sweep, reference)
    out = sweep.folder / "report"
    tables, figures = make_tables(findings), make_figures(findings)
    for name in ("tables", "figures"):
        shutil.rmtree(out / name, ignore_errors=True)  # an earlier report may have had others
    for table in tables.values():
        atomic_write(out / "tables" / f"{table.name}.csv", table.csv.encode())
    sections = []
    for figure in tqdm(figures, desc="figure", unit="figure", leave=False):
        for kind in ("png", "svg"):
            atomic_write(out / "figures" / f"{figure.name}.{kind}", render(figure.draw, LIGHT, kind))
        light, dark = (_uri(render(figure.draw, theme, "svg", transparent=True)) for theme in (LIGHT, DARK))
        sections.append(Section(figure, light, dark, tables.get(figure.name) if figure.name in WITH_NUMBERS else None))
    content = {
        "title": "What does quantizing RoI coordinates cost?",
        "subtitle": f"{_count(findings.arms, 'operator')}, {_count(findings.seeds, 'seed')}, {_count(sweep.finished, 'finished run')}"
        + (f", {sweep.partial}" if sweep.partial else ""),
        "result": prose.headline(findings),
        "explanation": prose.cost_breakdown(findings),
        "tables": tables,
        "sections": sections,
        "problems": _problems(sweep, findings, reference),
        "made_from": _made_from(findings),
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


def _problems(sweep: Sweep, findings: Findings, reference: str) -> list[str]:
    """Return what a reader must know before trusting the numbers."""
    problems = [f"{run.arm}, seed {run.seed}: failed. {run.error.strip().splitlines()[-1]}" for run in sweep.failed]
    problems += [f"{arm}, seed {seed}: not finished." for arm, seed in sweep.missing]
    if findings.reference != reference:
        problems.append(f"There is no finished run of {reference}. The others are compared with {findings.reference}.")
    if sweep.partial:
        problems.append(f"All figures and tables are of {sweep.partial}.")
    if sweep.differing_geometry:
        which = " and ".join(f"{key} ({' or '.join(values)})" for key, values in sweep.differing_geometry.items())
        problems.append(
            f"The runs differ in {which}, so that differences are not those of the operators alone. Sampled regions and predicted costs "
            "are left out."
        )
    problems += findings.protocol.deviations
    if findings.varies_over == "images":
        problems.append("There is one seed. Intervals are over images and do not include the variation between trainings.")
    return problems


def _made_from(findings: Findings) -> list[tuple[str, str]]:
    """Return data, settings, software and command as (name, value)."""
    run = findings.sweep.finished[0]
    config, starts = run.config, read_origin(findings.sweep.folder)
    data = starts[-1]["data"] if starts else {}
    truth = findings.sweep.annotations
    evaluated = f"{len(truth.imgs)} images, {len(truth.anns)} objects of {len(truth.cats)} categories"
    facts = [("data", str(config.data.root)), *((f"data: {split}", words) for split, words in data.items())]
    strides = dict.fromkeys(
        f"{run.stride} pixels per cell" if run.stride else "that of each map of the detector's pyramid" for run in findings.sweep.finished
    )
    facts += [("evaluated on", evaluated), ("stride", " or ".join(strides)), ("seeds", ", ".join(map(str, findings.seeds)))]
    facts += [("training", _training([run.config for run in findings.sweep.finished]))]
    commits = dict.fromkeys(start["commit"] for start in starts) or [f"{commit()} (of this report, the sweep's was not recorded)"]
    used = starts[-1]["versions"] if starts else versions()
    facts += [("commit", ", ".join(commits)), ("versions", ", ".join(f"{name} {number}" for name, number in used.items()))]
    if starts:
        facts += [("machine", starts[-1]["machine"]), ("started", starts[0]["time"])]
        facts += [("command", command) for command in dict.fromkeys(start["command"] for start in starts)]
    return [*facts, ("report", date.today().isoformat())]


def _training(configs: Sequence[DictConfig]) -> str:
    """Describe length, batch size and learning rate, each with all values that the runs had."""

    def values(*of_runs: str) -> str:
        return " or ".join(dict.fromkeys(of_runs))

    limits = [(c.trainer.get("max_epochs") or -1, c.trainer.get("max_steps") or -1) for c in configs]
    length = values(*(f"{epochs} epochs" if steps < 0 else f"{steps} steps" for epochs, steps in limits))
    images = values(*(str(c.data.batch_size) for c in configs))
    rate = values(*(f"{c.optim.groups.lr:g}" for c in configs))
    alike = ", the same for all" if " or " not in length + images + rate else ""
    return f"{length} of {images} images a step, rate {rate}{alike}"
