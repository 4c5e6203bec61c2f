"""Frozen layers run by ncnn, whose Winograd convolutions are several times as fast as PyTorch's on a processor without bfloat16."""

import copy
import os
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from roi_quantization.detection.common.errors import InputError, MissingPackageError

SHAPES = [(1, 3, 64, 96), (1, 3, 96, 64)]  # of a batch; two, which tell the converter that height and width vary

LARGEST_DIFFERENCE = 1e-4  # of the norm of the maps; rounding to float16 makes 2e-4


def ncnn_layers(layers: nn.Module, threads: int | None = None) -> Callable[[Tensor], Tensor]:
    """Convert layers with pnnx, and return a function that runs them with ncnn on the CPU.

    Args:
        layers: convolutions, batch norm in evaluation mode, activations, pooling and their kind.
        threads: None means one per core.

    Returns:
        float32 `[1, 3, H, W] -> [1, C, h, w]`, for any H and W; for VGG16 within 5e-6 of the norm of what `layers` return.

    Raises:
        MissingPackageError: ncnn or pnnx is not installed.
        InputError: pnnx cannot convert these layers, or ncnn gives other values on a random batch.
    """
    try:
        import ncnn
        import pnnx
    except ImportError as error:
        remedy = 'Run pip install -e ".[fast-features]", or choose features=cached'
        raise MissingPackageError(f"features=cached_ncnn needs ncnn and pnnx: {error}. {remedy}") from error
    layers = copy.deepcopy(layers).cpu()
    net = ncnn.Net()
    net.opt.num_threads = threads or os.cpu_count()
    net.opt.use_fp16_storage = net.opt.use_fp16_packed = net.opt.use_fp16_arithmetic = net.opt.use_bf16_storage = False
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TorchScript is deprecated, and it is what pnnx reads
        torch.jit.trace(layers, torch.zeros(SHAPES[0])).save(f"{folder}/layers.pt")
        shapes = [f"inputshape{end}={list(shape)}".replace(" ", "") for end, shape in zip(("", "2"), SHAPES, strict=True)]
        done = subprocess.run([pnnx.EXEC_PATH, "layers.pt", *shapes, "fp16=0"], cwd=folder, capture_output=True, text=True)
        files = [Path(folder) / f"layers.ncnn.{end}" for end in ("param", "bin")]
        if done.returncode or not all(file.is_file() for file in files) or net.load_param(str(files[0])) or net.load_model(str(files[1])):
            last = (done.stderr or done.stdout).strip().splitlines()[-1:]
            raise InputError(f"pnnx cannot convert the frozen layers of {type(layers).__name__} {last}: choose features=cached")

    def run(batch: Tensor) -> Tensor:
        values = np.ascontiguousarray(batch[0].cpu().numpy())  # a name of its own: ncnn.Mat does not keep its memory alive
        extractor = net.create_extractor()
        extractor.input("in0", ncnn.Mat(values))
        status, output = extractor.extract("out0")
        if status:
            raise RuntimeError(f"ncnn ended with status {status} on a batch of shape {list(batch.shape)}: is there not enough memory?")
        return torch.from_numpy(np.array(output))[None]

    sample = torch.randn(SHAPES[1], generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = layers(sample)
    difference = float((run(sample) - expected).norm() / expected.norm())
    if not difference <= LARGEST_DIFFERENCE:
        raise InputError(
            f"ncnn gives other values for the frozen layers of {type(layers).__name__}, apart by {difference:.1e} of their norm: choose "
            "features=cached"
        )
    return run
