"""Does training hold on to memory? The resident set of train.py's process over the steps of a run.

    python benchmarks/memory.py                                                  # the default run, for 2000 steps
    python benchmarks/memory.py --steps 500 'data.train_transform.short_side=[192,224,256,288,320]' data.num_workers=2

Overrides of train.py's configuration may follow. The slope is that of a least-squares line through the samples after the warm-up: the first
steps, and the default run's first validation after step 200, load libraries and grow buffers. Reads /proc, so it runs on Linux only.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytorch_lightning as pl

from roi_quantization.detection.common.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
SAMPLES_FILE = "memory.json"  # in the run folder


def monitored_trainer(callbacks: list[pl.Callback], every: int, **settings: object) -> pl.Trainer:
    """Return train.py's trainer with a `ResidentSetMonitor`."""
    return pl.Trainer(callbacks=[*callbacks, ResidentSetMonitor(every)], **settings)


class ResidentSetMonitor(pl.Callback):
    """Sample the memory of this process and of its data-loader workers, in MB, and write memory.json into the run folder.

    Args:
        every: steps from one sample to the next.
    """

    def __init__(self, every: int):
        self.every = every
        self.samples: dict[str, list] = {"step": [], "resident": [], "workers": []}

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step % self.every == 0:
            workers = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
            values = trainer.global_step, read_megabytes("self", "Rss"), sum(read_megabytes(worker, "Pss") for worker in workers)
            for column, value in zip(self.samples.values(), values, strict=True):
                column.append(value)

    def on_fit_end(self, trainer: pl.Trainer, *_: object) -> None:
        atomic_write(Path(trainer.default_root_dir) / SAMPLES_FILE, json.dumps(self.samples).encode())


def read_megabytes(process: str, what: str) -> float:
    """Read `Rss`, all resident pages, or `Pss`, each page divided by the number of processes that share it."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith(f"{what}:"))


def summarize(samples: dict[str, list], warmup: int) -> dict:
    """Fit the samples after `warmup` steps.

    Returns:
        For `resident` and `workers`: `slope` in MB per 1000 steps, `growth`, the maximum minus the first sample in MB, and `most`, the
        maximum over all samples.
    """
    step, resident, workers = (np.array(column, dtype=float) for column in samples.values())
    later = step > warmup
    fitted = {}
    for name, held in (("resident", resident), ("workers", workers)):
        slope = np.polyfit(step[later] / 1000, held[later], deg=1)[0]
        fitted[name] = {"slope": float(slope), "growth": float(held[later].max() - held[later][0]), "most": float(held.max())}
    return fitted


def format_table(samples: dict[str, list], fitted: dict, warmup: int) -> str:
    shown = np.unique(np.linspace(0, len(samples["step"]) - 1, 11).round().astype(int))
    lines = [f"{'step':>8}{'process, MB':>14}{'workers, MB':>14}"]
    lines += [f"{samples['step'][i]:8}{samples['resident'][i]:14.1f}{samples['workers'][i]:14.1f}" for i in shown]
    for name, title in (("slope", "MB a 1000 steps"), ("growth", "largest growth, MB")):
        lines.append(f"after {warmup} steps: {title} {fitted['resident'][name]:.1f}, workers {fitted['workers'][name]:.1f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--warmup", type=int, default=200, help="steps that the slope leaves out (default: 200)")
    parser.add_argument("--every", type=int, default=10, help="steps from one sample to the next (default: 10)")
    parser.add_argument("--json", type=Path, help="also write all samples to this file")
    parser.add_argument("overrides", nargs="*", help="of train.py's configuration")
    args = parser.parse_intermixed_args()

    with TemporaryDirectory() as folder:
        length = [f"trainer.max_steps={args.steps}", "trainer.max_epochs=-1"]
        monitor = ["trainer._target_=memory.monitored_trainer", f"+trainer.every={args.every}", f"hydra.run.dir={folder}"]
        paths = os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, str(ROOT / "train.py"), *length, *monitor, *args.overrides]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": paths})
        samples = json.loads((Path(folder) / SAMPLES_FILE).read_text())
    fitted = summarize(samples, args.warmup)
    print(format_table(samples, fitted, args.warmup))
    if args.json:
        atomic_write(args.json, json.dumps({"command": command[1:], "summary": fitted, "samples": samples}).encode())


if __name__ == "__main__":
    main()
