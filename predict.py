"""Detect objects in any picture or folder of pictures: `python predict.py ckpt=runs/<run>/best.ckpt image=dog.jpg`. See `--help`."""

import roi_quantization  # noqa: F401 -- first: it says so where the package is not installed

# isort: split
import json
import sys
from collections.abc import Mapping
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader
from tqdm import tqdm

from roi_quantization.detection.common.configuration import CONFIGS, path_setting
from roi_quantization.detection.common.errors import InputError
from roi_quantization.detection.common.files import atomic_write
from roi_quantization.detection.data.coco import collate
from roi_quantization.detection.data.image_folder import find_images, read_images
from roi_quantization.detection.data.images import ImageRecord, decode
from roi_quantization.detection.evaluation.coco import to_coco_results, write_results
from roi_quantization.detection.evaluation.figures import plot_detections
from roi_quantization.detection.model.lightning_module import DetectionModule
from roi_quantization.detection.runs.checkpoint import compose_with_checkpoint, register_checkpoint
from roi_quantization.detection.runs.command_line import log_into_run_folder, replace_null_choices
from roi_quantization.detection.runs.detector import Detector
from roi_quantization.detection.runs.errors import handle_errors
from roi_quantization.detection.runs.lock import exclusive_run_folder
from roi_quantization.detection.runs.run_folder import check_run_folder, replace_results
from roi_quantization.detection.runs.setup import set_up_run
from roi_quantization.detection.runs.trainer import build_trainer


def predict(cfg: DictConfig) -> list[dict]:
    """Detect objects in `cfg.image` and fill `cfg.run_dir`: results.json, instances.json and pictures/. Return the results.

    An earlier prediction in this folder is replaced, once nothing is missing to begin this one.

    Raises:
        InputError: the folder has a training or an evaluation, or another process is running there; or a setting is wrong.
    """
    if cfg.image is None:
        raise InputError("no picture is given. Set image=<picture or folder of pictures>")
    cfg.run_dir = path_setting(cfg.run_dir, "run_dir")
    with exclusive_run_folder(cfg.run_dir):
        return _predict(cfg)


def _predict(cfg: DictConfig) -> list[dict]:
    check_run_folder(cfg.run_dir, "predict.py")
    image = path_setting(cfg.image, "image")
    paths = find_images(image)
    bar = cfg.trainer.enable_progress_bar and len(paths) > 1
    drawn = Path(cfg.run_dir, "pictures").resolve()
    if any(path.parent.resolve().is_relative_to(drawn) for path in paths):
        raise InputError(f"image={image} contains {drawn}, where this run draws. Choose another folder with run_dir=runs/<name>")
    if not 0 <= cfg.score_threshold <= 1:
        raise InputError(f"score_threshold={cfg.score_threshold}: expected a number from 0 to 1")
    records, bad = read_images(paths, bar)
    if not records:
        raise InputError(f"image={image}: none of {len(paths)} pictures can be read; {paths[0].name}: {bad[paths[0]]}")
    run_dir = set_up_run(cfg)

    detector = Detector(cfg, device="cpu")
    pictures = detector.dataset(records)
    loader = DataLoader(pictures, collate_fn=collate, num_workers=cfg.data.num_workers if len(records) > 1 else 0)
    trainer = build_trainer(OmegaConf.merge(cfg.trainer, {"enable_progress_bar": bar}), enable_checkpointing=False)
    if trainer.world_size > 1:
        raise InputError(
            f"predict.py runs in one process, and trainer asks for {trainer.world_size}. Set trainer=default or trainer.devices=1"
        )
    if cfg.trainer.get("fast_dev_run") or cfg.trainer.get("limit_predict_batches") is not None:
        raise InputError("trainer.limit_predict_batches and fast_dev_run leave out pictures. Remove them, and give fewer with image=")
    replace_results(cfg, run_dir, "predict.py")
    found = {image_id: one for batch in trainer.predict(DetectionModule(detector.model), loader) for image_id, one in batch.items()}

    results = to_coco_results(found, {label: category["id"] for label, category in enumerate(detector.categories, 1)})
    names = {record.id: display_name(record, image) for record in records}
    images = [{"id": r.id, "file_name": names[r.id], "width": r.width, "height": r.height} for r in records]
    instances = {"images": images, "annotations": [], "categories": detector.categories}
    atomic_write(run_dir / "instances.json", json.dumps(instances, indent=1).encode())
    write_results(run_dir / "results.json", results)

    for record in tqdm(records, desc="drawing", unit="image", disable=not bar):
        path = run_dir / "pictures" / f"{names[record.id]}.png"
        plot_detections(decode(record.path), found[record.id], detector.names, path, cfg.score_threshold)
    for record in records[:10]:
        print(f"{names[record.id]}: {format_detections(found[record.id], detector.names, cfg.score_threshold)}")
    print(f"\n{len(records)} of {len(paths)} pictures, {len(results)} boxes. results.json, instances.json and pictures/ are in {run_dir}")
    for path, reason in bad.items():
        print(f"  could not be read: {path}: {reason}")
    return results


def display_name(record: ImageRecord, image: str) -> str:
    """Return the name of a picture: its file name, or its path inside the folder that was given."""
    return record.path.relative_to(image).as_posix() if Path(image).is_dir() else record.path.name


def format_detections(found: Mapping, classes: Mapping[int, str], threshold: float) -> str:
    """Format the detections of a picture as one line, highest score first."""
    pairs = zip(found["labels"].tolist(), found["scores"].tolist(), strict=True)
    return ", ".join(f"{classes[label]} {score:.2f}" for label, score in pairs if score >= threshold) or f"nothing above {threshold:g}"


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="predict")
def _main(cfg: DictConfig) -> None:
    with handle_errors("predict.py"):
        predict(compose_with_checkpoint(cfg))


def main() -> None:
    """Compose the configuration from the checkpoint's and the command line, and run."""
    sys.argv[1:] = log_into_run_folder(replace_null_choices(sys.argv[1:]))
    register_checkpoint(sys.argv[1:], "predict.py")
    _main()


if __name__ == "__main__":
    main()
