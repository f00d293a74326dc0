"""python -m gradexp.saliency IMAGE --model teacher --method fullgrad: draws a saliency map of any picture as a PNG."""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from gradexp.base.errors import UserError
from gradexp.base.files import write_atomically
from gradexp.data import pictures
from gradexp.data.dataset import ImageData
from gradexp.engine.assemble import declare_data, load_model, make_hardware, make_saliency
from gradexp.engine.compose import compose_run, plan
from gradexp.engine.ensure import finish
from gradexp.engine.exits import exit_on_errors
from gradexp.report.draw.gallery import draw_map, picture
from gradexp.report.figures import STYLE
from gradexp.tasks.saliency_score import completeness


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m gradexp.saliency", description=__doc__)
    parser.add_argument("image", type=Path, help="a picture of any size: PNG, JPEG, ...")
    parser.add_argument("--model", default="teacher", help="experiment that gives the model; done first where it is missing")
    parser.add_argument("--method", default="fullgrad", help="one of conf/saliency/")
    parser.add_argument("--target", type=int, help="class to explain; the predicted one when left out")
    parser.add_argument("--out", type=Path, help="PNG to write; beside the image when left out")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides, such as scale=quick or seed=1")
    given = parser.parse_args(words)
    with exit_on_errors():
        out = given.out or given.image.with_name(f"{given.image.stem}_{given.method}.png")
        explain(given.image, given.model, given.method, given.target, out, given.set)


def explain(path: Path, model_name: str, method_name: str, target: int | None, out: Path, overrides: list[str]) -> None:
    """Reads, computes, writes; says the class, its logit and, for FullGrad, how complete the full-gradients are."""
    run = plan([f"experiment={model_name}", *(word for word in overrides if not word.startswith("saliency."))])
    if "model" not in run.config:
        raise UserError(f"--model {model_name}: its runs train no model; give an experiment that does, such as teacher")
    of_method = [word for word in overrides if word.startswith(("saliency.", "scale"))]
    saliency = compose_run(["experiment=saliency_gallery", f"saliency={method_name}", *of_method])
    image = pictures.read(path)
    hardware = make_hardware(run.config)
    model = load_model(finish(run), hardware)
    # The data set says how pixels are normalised; only where that is by its own statistics are its images read.
    data = declare_data(run.config, run.paths)
    method = make_saliency(saliency, data, hardware)

    pixels = fitted(image, data)
    images = normalised(pixels, data).to(hardware.device)
    saliency_map = method(model, images, target)[0, 0].cpu().numpy()
    with torch.no_grad():
        logits = model(images)[0]
    shown = int(logits.argmax()) if target is None else target
    for name, error in completeness(method, model, images, target).items():
        print(f"{name.replace('_', ' ')}: {float(error):.1e} of the logit")
    write_atomically(out, drawn(pixels, saliency_map, f"{method_name}, class {shown}"))
    print(f"class {shown}, logit {float(logits[shown]):.2f}; written: {out}")


def fitted(image: Image.Image, data: ImageData) -> np.ndarray:
    """The largest square in the middle, in the size and channels of the data set. (C, H, W) uint8."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side)).resize((data.size, data.size), Image.Resampling.BILINEAR)
    return np.asarray(square).transpose(2, 0, 1) if data.channels == 3 else np.asarray(square.convert("L"))[None]


def normalised(pixels: np.ndarray, data: ImageData) -> torch.Tensor:
    """(C, H, W) uint8 -> (1, C, H, W), as the model was trained."""
    mean, std = (values.view(-1, 1, 1) for values in data.statistics)
    return ((torch.tensor(pixels) / 255 - mean) / std)[None]


def drawn(pixels: np.ndarray, saliency_map: np.ndarray, title: str) -> bytes:
    """Image, map, and the map over the image, as PNG."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6, 2.25))
        places = figure.subplots(1, 3)
        for axes in places:
            axes.set_axis_off()
        picture(places[0], pixels)
        draw_map(places[1], saliency_map, None)
        draw_map(places[2], saliency_map, pixels)
        figure.suptitle(title, fontsize=8)
        content = io.BytesIO()
        figure.savefig(content, format="png")
    return content.getvalue()


if __name__ == "__main__":
    main()
