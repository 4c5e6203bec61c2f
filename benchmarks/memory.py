"""Does training hold on to memory? The resident set of train.py's process, step by step.

    python benchmarks/memory.py                                                  # the default run, for 2000 steps
    python benchmarks/memory.py --steps 500 'data.train_transform.short_side=[192,224,256,288,320]' data.num_workers=2

What train.py takes may follow. The first steps, and the default run's first validation after step 200, load libraries and find the size of
buffers: they are left out of the slope, a least-squares line through what was read after them. Linux alone tells what is read here.
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

from roi_quantization.detection.files import atomic_write

ROOT = Path(__file__).resolve().parents[1]
FOUND = "memory.json"  # in the run folder


def watched(callbacks: list[pl.Callback], every: int, **settings: object) -> pl.Trainer:
    """train.py's trainer with one callback more."""
    return pl.Trainer(callbacks=[*callbacks, ResidentSet(every)], **settings)


class ResidentSet(pl.Callback):
    """After every so many steps, what this process holds, and its loading processes together, in MB: memory.json in the run folder."""

    def __init__(self, every: int):
        self.every = every
        self.read: dict[str, list] = {"step": [], "resident": [], "workers": []}

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step % self.every == 0:
            workers = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
            values = trainer.global_step, megabytes("self", "Rss"), sum(megabytes(worker, "Pss") for worker in workers)
            for column, value in zip(self.read.values(), values, strict=True):
                column.append(value)

    def on_fit_end(self, trainer: pl.Trainer, *_: object) -> None:
        atomic_write(Path(trainer.default_root_dir) / FOUND, json.dumps(self.read).encode())


def megabytes(process: str, what: str) -> float:
    """Rss: all that is in memory; Pss: each page divided by the number of processes that share it."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) / 1000 for line in lines if line.startswith(f"{what}:"))


def summary(read: dict[str, list], warmup: int) -> dict:
    """`slope` in MB a 1000 steps and `growth`, the most that was held beyond what was held first, both after `warmup` steps."""
    step, resident, workers = (np.array(column, dtype=float) for column in read.values())
    later = step > warmup
    told = {}
    for name, held in (("resident", resident), ("workers", workers)):
        slope = np.polyfit(step[later] / 1000, held[later], deg=1)[0]
        told[name] = {"slope": float(slope), "growth": float(held[later].max() - held[later][0]), "most": float(held.max())}
    return told


def table(read: dict[str, list], told: dict, warmup: int) -> str:
    shown = np.unique(np.linspace(0, len(read["step"]) - 1, 11).round().astype(int))
    lines = [f"{'step':>8}{'process, MB':>14}{'workers, MB':>14}"]
    lines += [f"{read['step'][i]:8}{read['resident'][i]:14.1f}{read['workers'][i]:14.1f}" for i in shown]
    for name, title in (("slope", "MB a 1000 steps"), ("growth", "largest growth, MB")):
        lines.append(f"after {warmup} steps: {title} {told['resident'][name]:.1f}, workers {told['workers'][name]:.1f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--warmup", type=int, default=200, help="steps that the slope leaves out (default: 200)")
    parser.add_argument("--every", type=int, default=10, help="steps from one reading to the next (default: 10)")
    parser.add_argument("--json", type=Path, help="also write everything read to this file")
    parser.add_argument("overrides", nargs="*", help="of train.py's configuration")
    args = parser.parse_intermixed_args()

    with TemporaryDirectory() as folder:
        length = [f"trainer.max_steps={args.steps}", "trainer.max_epochs=-1"]
        watching = ["trainer._target_=memory.watched", f"+trainer.every={args.every}", f"hydra.run.dir={folder}"]
        paths = os.pathsep.join([str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, str(ROOT / "train.py"), *length, *watching, *args.overrides]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": paths})
        read = json.loads((Path(folder) / FOUND).read_text())
    told = summary(read, args.warmup)
    print(table(read, told, args.warmup))
    if args.json:
        atomic_write(args.json, json.dumps({"command": command[1:], "summary": told, "read": read}).encode())


if __name__ == "__main__":
    main()
