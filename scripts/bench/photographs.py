"""How many photographs a second reach a model: JPEG files read, decoded, resized, cut and normalised, in random views."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from joblib import cpu_count
from PIL import Image

from bench.timing import medians
from gradexp.data.folder import FileLoader, Files
from gradexp.engine.compose import compose_run
from gradexp.engine.hardware import Hardware

SHAPE = (375, 500)  # rows and columns of a usual photograph of ImageNet
QUALITY = 92


@dataclass(frozen=True)
class Row:
    images: int
    kilobytes: float  # of a file, on average
    batch: int
    cores: int
    images_per_second: float


def photograph(file: Path, seed: int) -> None:
    """Noise with the spectrum of photographs (amplitude 1 / frequency), whose JPEG is about as large as theirs."""
    rows, columns = SHAPE
    frequency = np.hypot(np.fft.fftfreq(rows)[:, None], np.fft.rfftfreq(columns)[None])
    frequency[0, 0] = 1
    noise = np.random.default_rng(seed).standard_normal((3, rows, columns))
    values = np.fft.irfft2(np.fft.rfft2(noise) / frequency, s=SHAPE)
    pixels = (128 + 50 * values / values.std()).clip(0, 255).astype(np.uint8)
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(file, quality=QUALITY)


def measure(hardware: Hardware, *, images: int, rounds: int) -> Row:
    """Median over `rounds` passes with the batches and views of Table 2.3 at scale=paper; files in the system's cache."""
    hardware.apply()
    config = compose_run(["experiment=jacobian_transfer", "scale=paper"])
    data, batch = config["data"], config["optim"]["batch_size"]
    with tempfile.TemporaryDirectory() as folder:
        root, names = Path(folder), np.array([f"{number}.jpg" for number in range(images)])
        for number, name in enumerate(names):
            photograph(root / name, number)
        kilobytes = sum((root / name).stat().st_size for name in names) / images / 1000
        files = Files(root, names, np.zeros(images, dtype=np.int64), names)
        loader = FileLoader(
            files,
            np.arange(images),
            size=data["size"],
            resize=data["size"] + 2 * data["crop"],
            batch_size=batch,
            mean=torch.tensor(data["mean"]),
            std=torch.tensor(data["std"]),
            device=hardware.device,
            shuffle=True,
            flip=data["flip"],
            crop=data["crop"],
        )
        seconds, _ = medians({"pass": lambda: list(map(len, loader))}, rounds=rounds, cuda=hardware.kind == "gpu")
    return Row(images, kilobytes, batch, cpu_count(), images / seconds["pass"])


def markdown(row: Row) -> str:
    size = f"{SHAPE[1]}x{SHAPE[0]} pixels, {row.kilobytes:.0f} kB"
    return (
        "# Photographs\n\n"
        f"{row.images_per_second:.0f} images/s from JPEG files ({size}) to normalised batches of {row.batch} at 224 pixels, on "
        f"{row.cores} cores, with nothing else to do; the files are in the system's cache.\n"
    )
