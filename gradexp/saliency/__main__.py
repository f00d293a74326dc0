"""Explains pictures: the class that a network predicts, and saliency maps over the picture.

Maps are drawn over the part of the picture that the network gets: the square in its middle (for most published weights a
little less than the short side), which is framed; the rest is pale. The picture keeps its own size and aspect; one of less than
480 pixels is enlarged, one of more than 2400 is reduced.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gradexp.base.errors import UserError, nearest
from gradexp.base.files import intact, write_atomically
from gradexp.data import pictures
from gradexp.data.dataset import ImageData
from gradexp.engine.assemble import declare_data, load_model, make_hardware
from gradexp.engine.build import build
from gradexp.engine.compose import compose_run, conf_folders, plan
from gradexp.engine.ensure import finish
from gradexp.engine.exits import exit_on_errors
from gradexp.engine.hardware import Hardware
from gradexp.engine.run import Config, Run
from gradexp.engine.task import task_of
from gradexp.gradients import checked_logits
from gradexp.models.published import RANDOM, Classifier, central, timm_classifier, torchvision_classifier
from gradexp.report.costs import History
from gradexp.report.draw.explanation import explanation
from gradexp.saliency import FullGrad, Saliency

EXAMPLES = """examples:
  python -m gradexp.saliency photo.jpg
  python -m gradexp.saliency *.jpg --method fullgrad,gradcam,smoothgrad --out maps/
  python -m gradexp.saliency photo.jpg --model torchvision:vit_b_16 --target "tabby cat"
  python -m gradexp.saliency photo.jpg --model torchvision:resnet18 --weights mine.pth --size 448
  python -m gradexp.saliency photo.jpg --model experiment:teacher --train --set scale=quick --set seed=1
"""
KINDS = ("png", "pdf", "jpg", "jpeg", "svg")  # of files that are drawn
LIBRARIES = {"torchvision": torchvision_classifier, "timm": timm_classifier}
OF_METHOD = ("saliency.", "trainer.", "scale")  # overrides that a published network takes, too


def main(words: list[str] | None = None) -> None:
    given = parsed(words)
    with exit_on_errors():
        files = out_files(given.pictures, given.out, given.method)
        readable = [path for path in files if can_be_read(path)]
        explained = 0
        if readable:
            configs = method_configs(given.method, given.set)
            classifier, hardware = make_classifier(given, next(iter(configs.values())))
            target = label_of(given.target, classifier)
            methods = make_methods(configs, classifier, hardware)
            for path in readable:
                try:
                    explain(path, files[path], classifier, methods, target, hardware)
                    explained += 1
                except UserError as error:
                    complain(error)
        if explained < len(files):
            sys.exit(1)


def parsed(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m gradexp.saliency",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("pictures", nargs="*", type=Path, metavar="PICTURE", help="files of any size: PNG, JPEG, TIFF, ...")
    networks = "torchvision:NAME or timm:NAME, a classifier with published weights (default: torchvision:resnet50), or "
    networks += "experiment:NAME, a network that an experiment of conf/experiment/ trained, such as teacher"
    add("--model", default="torchvision:resnet50", metavar="SOURCE:NAME", help=networks)
    weights = f"a file with a state dict, the name of another published version, or {RANDOM} (default: those recommended)"
    add("--weights", metavar="FILE", help=weights)
    add("--size", type=int, metavar="PIXELS", help="side of the square that the network gets (default: that of the weights)")
    add("--method", default="fullgrad", help="files of conf/saliency/, separated by commas (default: fullgrad)")
    add("--target", help="class to explain, its number or name (default: the predicted one)")
    add("--out", type=Path, metavar="FILE|FOLDER", help=f"file ({', '.join(KINDS)}), or folder (default: beside the picture)")
    add("--train", action="store_true", help="train the network of experiment:NAME if it is not trained yet")
    overrides = "of saliency, such as saliency.samples=20; of the experiment, such as scale=quick or seed=1"
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=overrides)
    words = sys.argv[1:] if words is None else words
    end = words.index("--") if "--" in words else len(words)  # which parse_intermixed_args does not know
    given = parser.parse_intermixed_args(words[:end])
    # `--set scale=quick photo.jpg`: what is no override is a picture.
    given.pictures += [Path(word) for word in given.set if "=" not in word] + [Path(word) for word in words[end + 1 :]]
    given.set = [word for word in given.set if "=" in word]
    if not given.pictures:
        parser.error("give a picture, such as photo.jpg")
    if given.size is not None and given.size < 1:
        parser.error(f"--size {given.size}: give a number of pixels, such as 448")
    return given


# --- files ----------------------------------------------------------------------------------------------------


def out_files(paths: Sequence[Path], out: Path | None, method: str) -> dict[Path, Path]:
    """{picture: file to write}. Raises UserError where one can't be written or two would be the same.

    Without `out`, pictures in which others of them are explained, such as those of an earlier `*.png`, are left out.
    """
    method = "_".join(names_of(method))
    if out is not None and out.suffix and not out.is_dir():
        if len(paths) > 1:
            raise UserError(f"--out {out}: several pictures need a folder")
        if out.suffix[1:].lower() not in KINDS:
            raise UserError(f"--out {out}: the file's name ends in .{' or .'.join(KINDS)}")
        files = {paths[0]: out}
    else:
        files = {path: (out or path.parent) / f"{path.stem}_{method}.png" for path in paths}
        explained = {file.resolve() for file in files.values()} if out is None else set()
        for path in [path for path in files if path.resolve() in explained]:
            print(f"{path} is left out: another of the pictures is explained in it")
            del files[path]
    for path, file in files.items():
        twins = [other for other in files if files[other] == file]
        if len(twins) > 1:
            raise UserError(f"{' and '.join(map(str, twins))} would both be explained in {file}; explain them one by one")
        if file.resolve() in {picture.resolve() for picture in files}:
            raise UserError(f"--out {file} is a picture to explain; give another name")
        if path.exists():
            check_writable(file)
    return files


def check_writable(file: Path) -> None:
    """Raises UserError where a file can't be written, before any work. Makes its folder."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(file.parent, os.W_OK) and not file.is_dir()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"{file}: the name is too long; give a shorter one: --out FILE.png") from None
        writable = False
    if not writable:
        raise UserError(f"{file} can't be written; give a file or folder that can be: --out FOLDER")


def can_be_read(path: Path) -> bool:
    """Whether a file is a picture; the reason is printed where it is not."""
    try:
        pictures.read(path, note=lambda line: None)
    except UserError as error:
        complain(error)
        return False
    return True


def complain(error: UserError) -> None:
    print(f"error: {error}", file=sys.stderr, flush=True)


# --- networks -------------------------------------------------------------------------------------------------


def make_classifier(given: argparse.Namespace, config: Config) -> tuple[Classifier, Hardware]:
    """The network that `--model` names, on the device that it runs on. config: of the hardware for a published one."""
    source, _, name = given.model.rpartition(":")
    if not source:
        is_experiment = any((folder / "experiment" / f"{name}.yaml").exists() for folder in conf_folders())
        source = "experiment" if is_experiment else "torchvision"
    if source == "experiment":
        for option in ("weights", "size"):
            if getattr(given, option) is not None:
                raise UserError(f"--{option} is for published networks; {given.model} has its own")
        return experiment_classifier(name, [word for word in given.set if not word.startswith("saliency.")], given.train)
    if source not in LIBRARIES:
        known = [f"{known}:{name}" for known in (*LIBRARIES, "experiment")]
        raise UserError(f"--model {given.model}: it is {', '.join(known[:-1])} or {known[-1]}{nearest(given.model, known)}")
    if given.train:
        raise UserError(f"--train is for networks of experiments, such as experiment:teacher; {given.model} is published")
    for word in given.set:
        if not word.startswith(OF_METHOD):
            raise UserError(f"--set {word}: a published network takes overrides of saliency, trainer and scale only")
    hardware = make_hardware(config)
    classifier = LIBRARIES[source](name, weights=given.weights, size=given.size)
    return replace(classifier, model=hardware.place(classifier.model).requires_grad_(False)), hardware


def experiment_classifier(name: str, overrides: Sequence[str], train: bool) -> tuple[Classifier, Hardware]:
    """The network of an experiment's run. Raises UserError where it is not trained, unless `train`."""
    run = plan([f"experiment={name}", *overrides])
    if "model" not in run.config:
        raise UserError(f"--model experiment:{name}: its runs train no model; give an experiment that does, such as teacher")
    hardware = make_hardware(run.config)
    trainings = [each for each in missing(run) if "optim" in each.config]
    if trainings and not train:
        raise UserError(
            f"experiment:{name} is not trained yet, which takes {estimate(trainings, hardware)}; add --train to do it"
        )
    model = load_model(finish(run), hardware)
    # The data set knows how pixels are normalised; its images are read only where that is by its own statistics.
    data = declare_data(run.config, run.paths)
    mean, std = (values.view(-1, 1, 1) for values in data.statistics)
    classifier = Classifier(
        title=f"experiment {name}, run {run.id}",
        model=model,
        prepare=lambda picture: (fitted(picture, data) - mean) / std,
        region=central,
        classes=data.class_names(range(run.config["data"]["classes"])),
        mean=mean,
        std=std,
    )
    return classifier, hardware


def missing(run: Run) -> list[Run]:
    """The runs that are done before the network of `run` is on this disk."""
    if run.finished and intact(run.folder / task_of(run.config).product):
        return []
    return [*chain.from_iterable(missing(below) for below in run.upstream.values()), run]


def estimate(runs: Sequence[Run], hardware: Hardware) -> str:
    """How long runs take, by the records of similar ones."""
    history = History.of(runs[0].paths, hardware.facts()["device"], "wall" if hardware.kind == "gpu" else "cpu")
    costs = [history.cost(run.config) for run in runs]
    if not all(costs):
        return "a time that no record of a similar run tells"
    minutes = sum(cost.seconds for cost in costs if cost) / 60
    return f"about {minutes:.0f} minutes" if minutes >= 2 else "a minute or two"


def fitted(picture: Image.Image, data: ImageData) -> Tensor:
    """The largest square in the middle, in the size and channels of the data set. (1, C, H, W) in [0, 1]."""
    left, top, right, bottom = (int(edge) for edge in central(picture.size))
    square = picture.crop((left, top, right, bottom)).resize((data.size, data.size), Image.Resampling.BILINEAR)
    pixels = np.array(square if data.channels == 3 else square.convert("L"))
    return torch.tensor(pixels).view(data.size, data.size, data.channels).permute(2, 0, 1)[None] / 255


def label_of(target: str | None, classifier: Classifier) -> int | None:
    """The label that `--target` means. Raises UserError for an unknown or ambiguous name."""
    if target is None:
        return None
    if re.fullmatch(r"-?[0-9]+", target):
        return int(target)
    wanted, names = target.lower(), [name.lower() for name in classifier.classes]
    # timm's names are lists of synonyms, such as "tench, Tinca tinca".
    labels = [label for label, name in enumerate(names) if wanted == name or wanted in name.split(", ")]
    if len(labels) == 1:
        return labels[0]
    if labels:
        raise UserError(f"--target {target}: classes {' and '.join(map(str, labels))} have this name; give the number")
    parts = [name for name in names if wanted in name][:5]
    hint = f"; did you mean {' or '.join(parts)}?" if parts else nearest(wanted, names)
    raise UserError(f"--target {target}: {classifier.title} has no such class{hint}")


# --- methods --------------------------------------------------------------------------------------------------


def method_configs(names: str, overrides: Sequence[str]) -> dict[str, Config]:
    """{method: a config with it} of the methods that `--method` names.

    An override of `saliency` is for those methods that have its key. Raises UserError where none has it.
    """
    general = [word for word in overrides if word.startswith(("trainer.", "scale"))]
    own = [word for word in overrides if word.startswith("saliency.")]
    commands = {name: ["experiment=saliency_gallery", f"saliency={name}", *general] for name in names_of(names)}
    keys = {name: compose_run(words)["saliency"] for name, words in commands.items()}
    for word in own:
        if not any(key_of(word) in known for known in keys.values()):
            compose_run([*list(commands.values())[-1], word])  # raises UserError, which names the nearest key
    return {
        name: compose_run([*words, *(word for word in own if key_of(word) in keys[name])]) for name, words in commands.items()
    }


def make_methods(configs: Mapping[str, Config], classifier: Classifier, hardware: Hardware) -> dict[str, Saliency]:
    """The methods for images in the normalisation of a classifier."""
    mean, std = classifier.mean.to(hardware.device), classifier.std.to(hardware.device)
    return {name: build(config["saliency"], where="saliency", black=-mean / std, std=std) for name, config in configs.items()}


def names_of(methods: str) -> list[str]:
    """The methods of `--method`, each once. Raises UserError for what can't be the name of one."""
    names = list(dict.fromkeys(name.strip() for name in methods.split(",")))
    if wrong := [name for name in names if not re.fullmatch(r"\w+", name)]:
        raise UserError(f"--method {methods}: {wrong[0]!r} is no name; give files of conf/saliency/, separated by commas")
    return names


def key_of(override: str) -> str:
    return override.partition("=")[0].removeprefix("saliency.").partition(".")[0]


# --- one picture ----------------------------------------------------------------------------------------------


def explain(
    path: Path, out: Path, classifier: Classifier, methods: Mapping[str, Saliency], target: int | None, hardware: Hardware
) -> None:
    """Reads, computes, writes; prints the predicted classes and, for FullGrad, how complete its full-gradients are."""
    picture = pictures.read(path)
    model, images = classifier.model, classifier.prepare(picture).to(hardware.device)
    with torch.no_grad():
        logits = checked_logits(model(images))[0]
    maps = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no spatial location")  # printed below
        for name, method in methods.items():
            torch.manual_seed(0)  # for methods that add noise
            maps[name] = method(model, images, target)[0, 0].cpu().numpy()
    label = int(logits.argmax()) if target is None else target
    best = [f"{named(each, classifier)}: {value:.1%}" for each, value in probabilities(logits)]
    explained = f"class {named(label, classifier)}, probability {float(logits.softmax(0)[label]):.1%}"
    title = f"{classifier.title}: {explained}"
    write_atomically(out, explanation(picture, classifier.region(picture.size), maps, title, best, kind=out.suffix[1:].lower()))
    print(f"{path}: {'; '.join(best)}")
    for name, method in methods.items():
        if isinstance(method, FullGrad):
            error = float(method.completeness_error(model, images, target))
            share = float(method.share_without_place(model, images, target))
            print(f"{name}: completeness error {error:.1e} of the logit; {share:.1%} has no spatial location")
    print(f"{explained}, logit {float(logits[label]):.2f}; written: {out}", flush=True)


def probabilities(logits: Tensor) -> list[tuple[int, float]]:
    """The three most probable classes, (label, probability)."""
    values, labels = logits.float().softmax(0).topk(min(3, len(logits)))
    return list(zip(labels.tolist(), values.tolist(), strict=True))


def named(label: int, classifier: Classifier) -> str:
    """A label and, where it has one, its name."""
    names = classifier.classes
    return f"{label} ({names[label]})" if 0 <= label < len(names) and names[label] != str(label) else str(label)


if __name__ == "__main__":
    main()
