"""Measure how well proposals cover the objects of a data set.

python recall.py data=voc_animals data.root=... proposals=selective_search
"""

import roi_quantization  # noqa: F401 -- first, because it says so where the package is not installed

# isort: split
import sys

import hydra
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from roi_quantization.detection.common.configuration import CONFIGS, check_count, check_groups, evaluated_split
from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.data.proposals.recall import format_recall, recall_table
from roi_quantization.detection.model.build import instantiate
from roi_quantization.detection.runs.command_line import replace_null_choices
from roi_quantization.detection.runs.errors import handle_errors


def print_recall(cfg: DictConfig) -> list[dict]:
    """Print the recall of `cfg.proposals` on `cfg.split` of `cfg.data`, by object size and number of windows.

    Returns:
        The rows of the table, see `recall_table`.
    """
    check_groups(cfg, ("data", "proposals"))
    cfg.split = cfg.split or evaluated_split(cfg.data)
    if cfg.split not in ("train", "val", "test"):
        raise InputError(f"split={cfg.split}: expected train, val or test")
    if not OmegaConf.is_list(cfg.windows):
        raise InputError(f"windows={cfg.windows}: expected a list of numbers, such as [300,1000]")
    for count in cfg.windows:
        check_count(count, "windows")
    data = instantiate(cfg.data)
    data.prepare_data()
    data.setup({"train": "fit", "val": "validate", "test": "test"}[cfg.split])
    dataset = getattr(data, cfg.split)
    if dataset is None:
        present = ", ".join(name for name in ("train", "val", "test") if cfg.data[name] is not None)
        raise InputError(f"split={cfg.split}: this data set has no such split. Choose split= one of {present}, or set data.{cfg.split}.")
    windows = 0

    def images():
        nonlocal windows
        for index in tqdm(range(len(dataset)), desc="images"):
            proposals = dataset.proposals(dataset.records[index])
            windows += len(proposals)
            yield proposals, dataset.ground_truth(index)[0]

    rows = recall_table(images(), [*cfg.windows, None])
    print(f"\n{cfg.split}: {len(dataset)} images, {rows[0]['objects']} objects, {windows / len(dataset):.0f} windows an image; percent\n")
    print(format_recall(rows))
    return rows


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="recall")
def _main(cfg: DictConfig) -> None:
    with handle_errors("recall.py"):
        print_recall(cfg)


def main() -> None:
    """Compose the configuration from the command line, and run."""
    sys.argv[1:] = replace_null_choices(sys.argv[1:])
    _main()


if __name__ == "__main__":
    main()
