"""Write the report: report.html, the same as report.md, tables as CSV, figures as PNG and SVG."""

import base64
import shutil
from collections.abc import Iterable, Sequence, Sized
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from roi_quantization.detection.common.configuration import evaluated_split, shorten
from roi_quantization.detection.common.files import atomic_write
from roi_quantization.detection.report import prose
from roi_quantization.detection.report.figures import ReportFigure, make_figures
from roi_quantization.detection.report.findings import Findings
from roi_quantization.detection.report.origin import commit, read_origin, versions
from roi_quantization.detection.report.style import DARK, LIGHT, render
from roi_quantization.detection.report.sweep import Run, Sweep, read_sweep
from roi_quantization.detection.report.tables import Table, make_tables

WITH_NUMBERS = {"differences", "localisation", "sizes", "misalignment", "predicted", "cross"}  # figures that have a table of the same name


@dataclass(frozen=True)
class Section:
    """A figure in the light and the dark theme as data: URIs, and the table with its numbers where there is one."""

    figure: ReportFigure
    light: str
    dark: str
    table: Table | None


def write_report(folder: Path | str, reference: str | None = "align") -> Path:
    """Write `<folder>/report/` from the finished runs of a sweep.

    Args:
        folder: of the sweep, see `roi_quantization.detection.report.sweep`.
        reference: the arm that others are compared with. Where it has no finished run, and for None, the first arm that has one.

    Returns:
        Path of report.html.

    Raises:
        ValueError: no run is finished, or a file of a run cannot be read. The message names it.
    """
    sweep = read_sweep(folder, planned=[(arm, seed) for start in reversed(read_origin(folder)) for arm, seed in start["runs"]])
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


def _problems(sweep: Sweep, findings: Findings, reference: str | None) -> list[str]:
    """Return what a reader must know before trusting the numbers."""
    problems = [f"{run.arm}, seed {run.seed}: failed. {_reason(run)}" for run in sweep.failed]
    problems += [f"{arm}, seed {seed}: not finished." for arm, seed in sweep.missing]
    if reference is not None and findings.reference != reference:
        problems.append(f"There is no finished run of {reference}. The others are compared with {findings.reference}.")
    if sweep.partial:
        problems.append(f"All figures and tables are of {sweep.partial}.")
    if sweep.differing_settings:
        which = shorten([f"{key} ({' or '.join(values)})" for key, values in sweep.differing_settings.items()])
        problems.append(f"The arms differ in more than the operator: {which}. Differences between them are of all of these.")
    if sweep.differing_geometry:
        which = " and ".join(f"{key} ({' or '.join(values)})" for key, values in sweep.differing_geometry.items())
        problems.append(
            f"The runs differ in {which}, so that differences are not those of the operators alone. Sampled regions and predicted costs "
            "are left out."
        )
    if sweep.unknown_geometry:
        problems.append(
            f"Sizes in cells, sampled regions and predicted costs are left out, because the configurations do not say enough: "
            f"{'; '.join(sweep.unknown_geometry)}."
        )
    if sweep.changed_data:
        problems.append(
            f"Images, annotations or proposals ({', '.join(sweep.changed_data)}) changed from one run to another. Differences between runs "
            "are of this as well."
        )
    problems += [f"{arm}: {differ}, so that its runs are not of one setting." for arm, differ in sweep.differing_seeds.items()]
    problems += findings.protocol.deviations
    if findings.varies_over == "images":
        alone = len(findings.image_ids) < 2
        over_images = "Intervals are over images and do not include the variation between trainings."
        problems.append(f"There is one seed. {'With one image there are no intervals.' if alone else over_images}")
    return problems


def _reason(run: Run) -> str:
    return (run.error.strip().splitlines() or ["No reason was written."])[-1]


def _made_from(findings: Findings) -> list[tuple[str, str]]:
    """Return data, settings, software and command as (name, value)."""
    run = findings.sweep.finished[0]
    config, starts = run.config, read_origin(findings.sweep.folder)
    data = starts[-1]["data"] if starts else {}
    truth = findings.sweep.annotations
    evaluated = f"{evaluated_split(config.data)}, {len(truth.imgs)} images, {len(truth.anns)} objects of {len(truth.cats)} categories"
    facts = [("data", str(config.data.root)), *((f"data: {split}", words) for split, words in data.items())]
    strides = dict.fromkeys(_stride(run) for run in findings.sweep.finished)
    facts += [("evaluated on", evaluated), ("stride", " or ".join(strides)), ("seeds", ", ".join(map(str, findings.seeds)))]
    facts += [("training", _training([run.config for run in findings.sweep.finished]))]
    commits = dict.fromkeys(start["commit"] for start in starts) or [f"{commit()} (of this report, the sweep's was not recorded)"]
    used = [start["versions"] for start in starts] or [versions()]
    numbers = {name: _joined(of_start[name] for of_start in used if name in of_start) for name in {**used[0], **used[-1]}}
    facts += [("commit", ", ".join(commits)), ("versions", ", ".join(f"{name} {number}" for name, number in numbers.items()))]
    if starts:
        facts += [("machine", _joined(start["machine"] for start in starts)), ("started", starts[0]["time"])]
        facts += [("command", command) for command in dict.fromkeys(start["command"] for start in starts)]
    return [*facts, ("report", date.today().isoformat())]


def _stride(run: Run) -> str:
    if run.config.get("backbone") is None:
        return "that of each map of the detector's pyramid"
    return f"{run.stride} pixels per cell" if run.stride else "not known (backbone.stride is not set)"


def _training(configs: Sequence[DictConfig]) -> str:
    """Describe length, images a step and learning rate, each with all values that the runs had."""
    length = _joined(_length(c.trainer) for c in configs)
    images = _joined(_images_a_step(c) for c in configs)
    rate = _joined(_rate(c) for c in configs)
    alike = ", the same for all" if " or " not in length + images + rate else ""
    return f"{length} of {images} images a step, rate {rate}{alike}"


def _rate(config: DictConfig) -> str:
    rate = OmegaConf.select(config, "optim.groups.lr")
    return "not known (optim.groups.lr is not set)" if rate is None else f"{rate:g}"


def _joined(words: Iterable[str]) -> str:
    return " or ".join(dict.fromkeys(words))


def _length(trainer: DictConfig) -> str:
    limits = [f"{trainer[key]} {unit}" for key, unit in (("max_epochs", "epochs"), ("max_steps", "steps")) if (trainer.get(key) or -1) > 0]
    if trainer.get("max_time"):
        limits.append(f"{trainer.max_time} (days, hours, minutes, seconds)")
    return f"{'at most ' * (len(limits) > 1)}{' and '.join(limits)}" if limits else "an unlimited number of steps"


def _images_a_step(config: DictConfig) -> str:
    """Return the images between two updates of the weights: of all batches and devices."""
    trainer, devices = config.trainer, config.trainer.get("devices", 1)
    images = config.data.batch_size * (trainer.get("accumulate_grad_batches") or 1) * (trainer.get("num_nodes") or 1)
    return str(images * devices) if isinstance(devices, int) and devices > 0 else f"{images} times the devices' number"
