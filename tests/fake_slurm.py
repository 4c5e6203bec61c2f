"""As much of SLURM as submitit speaks to, on this machine: sbatch for an array of jobs of one task, srun, sacct and scontrol requeue.

A job that was queued again begins anew with the same script. With FAKE_SLURM_PREEMPT, a pattern of files, the first job is told to leave by
SIGUSR2, as before its time is up, once there is such a file.

`python fake_slurm.py <folder> <command> ...`; the folder holds the state of each job in a file.
"""

import glob
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

ARRAY = "1000"
COMMANDS = ("sbatch", "srun", "sacct", "scontrol", "run_job")


def install(folder: Path) -> Path:
    """Makes the commands in `folder`, which is to be put before PATH."""
    folder.mkdir()
    for name in COMMANDS:
        (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {folder} {name} "$@"\n')
        (folder / name).chmod(0o755)
    return folder


def sbatch(folder: Path, script: str) -> None:
    text = Path(script).read_text()
    (folder / "script.sh").write_text(text)
    jobs = range(int(re.search(r"--array=0-(\d+)", text)[1]) + 1)
    for job in jobs:
        (folder / f"{job}.state").write_text("RUNNING")
        with open(folder / f"{job}.said", "w") as said:
            subprocess.Popen([folder / "run_job", str(job)], stdout=said, stderr=said, start_new_session=True)
    print(f"Submitted batch job {ARRAY}")


def run_job(folder: Path, job: str) -> None:
    environment = {"SLURM_JOB_ID": f"{ARRAY}{job}", "SLURM_ARRAY_JOB_ID": ARRAY, "SLURM_ARRAY_TASK_ID": job, "SLURM_JOB_NAME": "sweep"}
    environment |= {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "localhost"}
    awaited = os.environ.get("FAKE_SLURM_PREEMPT") if job == "0" else None
    requeued = folder / f"{job}.requeue"
    while True:
        process = subprocess.Popen(["bash", folder / "script.sh"], env=os.environ | environment, start_new_session=True)
        while process.poll() is None:
            if awaited and glob.glob(awaited):
                awaited = None
                (folder / f"{job}.told").touch()
                os.kill(int((folder / f"{job}.pid").read_text()), signal.SIGUSR2)
            time.sleep(0.02)
        if not requeued.exists():
            break
        requeued.unlink()
    (folder / f"{job}.state").write_text("COMPLETED" if process.returncode == 0 else "FAILED")


def srun(folder: Path, *arguments: str) -> None:
    """Becomes the command after its own options."""
    first = next(i for i, argument in enumerate(arguments) if Path(argument).name.startswith("python"))
    (folder / f"{os.environ['SLURM_ARRAY_TASK_ID']}.pid").write_text(str(os.getpid()))
    os.execvp(arguments[first], arguments[first:])


def sacct(folder: Path, *_: str) -> None:
    print("JobID|State|NodeList")
    for state in folder.glob("*.state"):
        print(f"{ARRAY}_{state.stem}|{state.read_text()}|localhost")


def scontrol(folder: Path, verb: str, job: str) -> None:
    assert verb == "requeue", shlex.join(sys.argv)
    (folder / f"{job.removeprefix(f'{ARRAY}_')}.requeue").touch()


if __name__ == "__main__":
    globals()[sys.argv[2]](Path(sys.argv[1]), *sys.argv[3:])
