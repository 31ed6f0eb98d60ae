"""What a benchmark's figures depend on: the machine, the libraries, the data, the settings."""

import contextlib
import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from benchmarks.storage import files_of
from dfer.lists.index import load_index


def machine() -> dict:
    """What the figures depend on."""
    names = ("torch", "torchvision", "nvidia-dali-cuda120", "numpy", "opencv-python-headless", "pillow", "av", "decord")
    versions = {}
    for name in (*names, "torchcodec", "webdataset", "simplejpeg", "spdl", "grain", "litdata"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cores": len(os.sched_getaffinity(0)),
        "cpu": models[0].partition(":")[2].strip() if models else platform.machine(),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **versions,
    }


def describe_data(list_path: Path, folder: Path) -> dict:
    index, paths = load_index(folder / "frames.txt"), files_of(folder, "frames")
    return {
        "list": str(list_path),
        "clips": len(index),
        "mean_frames": float(index.num_frames.mean()),
        "min_frames": int(index.num_frames.min()),
        "max_frames": int(index.num_frames.max()),
        "mean_bytes_per_frame": sum(map(os.path.getsize, paths)) / len(paths),
    }


def headline(report: dict) -> str:
    settings, data = report["settings"], report["data"]
    return (
        f"{settings['frames']} of {data['mean_frames']:.1f} frames ({data['min_frames']} to {data['max_frames']}; "
        f"{data['mean_bytes_per_frame'] / 1000:.1f} kB each), {data['clips']:,} clips, crops from "
        f"{settings['min_crop_area']:g} of the area, {settings['size']} px float32\n"
        f"batch {settings['batch_size']}, {settings['threads']} threads or workers on "
        f"{report['machine']['cores']} cores, {settings['device']}, "
        f"{'cold files' if settings['cold'] else 'files in memory'}"
    )
