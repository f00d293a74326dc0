"""Operation counts of runs, from the meta device, on which tensors have shapes and no values.

`unit_of(config)` counts what one image costs (one unit of `Task.work`); `Operations.seconds_on` a processor of stated speed
is a time that is computed, not measured. The plan uses both where nothing was measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from gradexp import gradients, layers
from gradexp.base.files import write_atomically
from gradexp.base.texts import read_json
from gradexp.data.loader import Batch
from gradexp.engine.assemble import make_model, make_optim, make_terms
from gradexp.engine.build import build
from gradexp.engine.run import ROOT, Config
from gradexp.engine.task import task_of
from gradexp.evaluate.model_randomisation import layers_from_output
from gradexp.training.targets import live_targets

if TYPE_CHECKING:
    from gradexp.training.classifier import Classifier

META = torch.device("meta")
SIZES = {  # training and test images, where no run has counted them
    "digits": (1_438, 359),
    "mnist": (60_000, 10_000),
    "cifar10": (50_000, 10_000),
    "cifar100": (50_000, 10_000),
    "cifar100_source": (40_000, 8_000),
    "mit_scenes": (5_360, 1_340),
    "imagenet": (1_281_167, 50_000),
}
REPEATS = ("steps", "samples", "copies")  # settings of saliency methods: how often they do the same
BATCH = 64  # images at a time of runs that train nothing
START = 20.0  # seconds that any run takes: imports, data, evaluation


@dataclass(frozen=True)
class Processor:
    """Peak speeds, and the share of them that is assumed to be reached. launch: seconds from one operation to the next."""

    name: str
    tflops: float
    gbytes: float
    launch: float
    share: float


H100 = {  # data sheet of the H100 SXM; fp32 without TF32
    "bf16": Processor("H100-class GPU, bf16", 989, 3350, 8e-6, 0.4),
    "32": Processor("H100-class GPU, fp32", 67, 3350, 8e-6, 0.4),
}
STORE = ROOT / "results" / "operations.json"  # counts are the same on every machine, and take seconds each
OWN = ROOT / "outputs" / "cache" / "operations.json"  # those that are not committed


@dataclass(frozen=True)
class Operations:
    """(floating-point operations, bytes read and written) of each operation of a batch; images: how many units that is.

    precision: `bf16` under autocast, `32` otherwise.
    """

    each: tuple[tuple[float, float], ...]
    images: float
    precision: str = "32"

    @property
    def flops(self) -> float:
        return sum(flops for flops, _ in self.each) / self.images

    @property
    def bytes(self) -> float:
        return sum(size for _, size in self.each) / self.images

    def seconds_on(self, processor: Processor) -> float:
        """Seconds a unit if every operation takes the longest of its arithmetic, its memory traffic and its launch."""
        speeds = 1e12 * processor.tflops * processor.share, 1e9 * processor.gbytes * processor.share
        return sum(max(flops / speeds[0], size / speeds[1], processor.launch) for flops, size in self.each) / self.images

    def repeated(self, times: int) -> Operations:
        return Operations(self.each * times, self.images, self.precision)

    def __add__(self, other: Operations) -> Operations:
        """Sums per unit. Both must have the same number of images."""
        if self.images != other.images:
            raise ValueError(f"operations of {self.images} and {other.images} images can't be added")
        return Operations(self.each + other.each, self.images, self.precision)


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operation inside; views are free. Bytes: inputs read once, outputs written once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.each: list[tuple[float, float]] = []
        self._last = ""  # operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            return int(self._last != "any")  # checks such as isfinite().all() pass, those such as isnan().any() raise nothing
        self._last = func.overloadpacket.__name__
        out = func(*args, **kwargs)
        if not func.is_view:
            count = flop_registry.get(func.overloadpacket)
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            self.each.append((count(*args, **kwargs, out_val=out) if count else 0, sum(tensor.nbytes for tensor in tensors)))
        return out


def counted(function: Callable[[], Any], images: float, precision: str = "32") -> Operations:
    with META, Counter() as counter:
        function()
    return Operations(tuple(counter.each), images, precision)


# --- trainings --------------------------------------------------------------------------------------------


def make_module(config: Config, student: nn.Module, teacher: nn.Module | None, example: Tensor) -> Classifier:
    """The LightningModule of a run with these networks; a teacher's targets are computed for every batch."""
    terms = make_terms(config)
    for term in terms.values():
        term.resolve_layers(student, teacher, example)
    if any(term.gradient_target for term in terms.values()):
        layers.accelerate(student)
    optim = make_optim(config)
    options: dict[str, Any] = {}
    if teacher is not None:
        angle = config["method"].get("angle")
        options = {"targets": live_targets(teacher, terms.values(), angle), **({"angle": angle} if angle else {})}
    node = {"_target_": config["method"]["module"]}
    common = {"student": student, "terms": terms, "optim": optim, "seed": 0, "steps_per_pass": 10**9}
    return build(node, where="method.module", **common, **options)


def training(config: Config) -> Operations:
    """A step of the run's training without the optimizer's single pass over the parameters."""
    size, batch = config["data"]["size"], config["optim"]["batch_size"]
    with META:
        student = make_model(config)
        teacher = make_model(config["upstream"]["teacher"]) if "teacher" in config["upstream"] else None
        example = torch.zeros(1, config["data"]["channels"], size, size)
        module = make_module(config, student, teacher, example)
        rows = torch.zeros(batch, dtype=torch.long)
        images = Batch(example.expand(batch, -1, -1, -1), rows, rows, rows)
    precision = "32" if module.full_precision or str(config["trainer"]["precision"]) == "32" else "bf16"
    return counted(lambda: module._loss(images).backward(), batch, precision)  # type: ignore[no-untyped-call]


# --- everything else --------------------------------------------------------------------------------------


def forward(config: Config, name: str = "model") -> Operations:
    model, images = _frozen(config, name)
    return counted(lambda: model(images), len(images))


def gradient(config: Config, name: str = "model") -> Operations:
    model, images = _frozen(config, name)
    labels = torch.zeros(len(images), dtype=torch.long, device=META)
    return counted(lambda: gradients.input_gradient(model, images, labels), len(images))


def saliency(config: Config) -> Operations:
    """Maps of the classes that the model predicts."""
    model, images = _frozen(config, "model")
    node, key = config["saliency"], next((key for key in REPEATS if key in config["saliency"]), None)
    short = node | {key: 1} if key else node
    colours = {name: torch.ones(config["data"]["channels"], 1, 1, device=META) for name in ("black", "std")}
    method = build(short, where="saliency", **colours)
    return counted(lambda: method(model, images), len(images)).repeated(node[key] if key else 1)


def _frozen(config: Config, name: str) -> tuple[nn.Module, Tensor]:
    size = config["data"]["size"]
    with META:
        images = torch.zeros(BATCH, config["data"]["channels"], size, size)
        return make_model(config["upstream"][name]).eval().requires_grad_(False), images


def _score(config: Config) -> Operations:
    return saliency(config) + forward(config).repeated(1 + len(config["evaluate"].get("fractions", [0])))


def _randomisation(config: Config) -> Operations:
    return saliency(config).repeated(1 + len(layers_from_output(_frozen(config, "model")[0])))


def _perturbation(config: Config) -> Operations:
    return gradient(config, "explainer") + forward(config).repeated(config["task"]["fractions"]["count"])


UNITS: Mapping[str, Callable[[Config], Operations]] = {  # what one unit of Task.work computes, by the name of the task
    "Train": training,
    "Fool": training,
    "SaliencyScore": _score,
    "SaliencyMaps": saliency,
    "ModelRandomisation": _randomisation,
    "GANTest": gradient,
    "ImplicitSamples": gradient,
    "Noise": forward,
    "DensityRatio": lambda config: forward(config).repeated(1 + len(config["task"]["sigmas"])),
    "ScoreObjective": lambda config: gradient(config) + forward(config).repeated(config["task"]["draws"]),
    "DiscriminativePerturbation": _perturbation,
}


@dataclass(frozen=True)
class Unit:
    """What one unit of work costs; gpu_seconds: computed for H100. batch: units at a time."""

    name: str
    flops: float
    bytes: float
    launches: int
    batch: float
    precision: str
    gpu_seconds: float
    parameters: int

    @property
    def memory_mib(self) -> float:
        """Half a GiB for torch; of a batch, a third of all bytes for the backward pass of a training, or 20 operations."""
        kept = 1 / 3 if self.parameters else 20 / max(1, self.launches)
        return 512 + kept * self.batch * self.bytes / 2**20

    @property
    def disk_mib(self) -> float:
        return 4 * self.parameters / 2**20


def counts(configs: Mapping[str, Config], store: Path = OWN) -> dict[str, Unit]:
    """The units of kinds of runs, {signature: config}; those that are not stored are counted, and stored in `store`."""
    advice = "delete it; what it held is counted again"
    committed, own = (read_json(file, advice) if file.exists() else {} for file in (STORE, store))
    stored = committed | own
    keys = {name: sha256(name.encode()).hexdigest()[:12] for name in configs}
    missing = {name: config for name, config in configs.items() if keys[name] not in stored}
    for number, (name, config) in enumerate(missing.items(), 1):
        print(f"[{number}/{len(missing)}] counting operations of {config['name']}", flush=True)
        stored[keys[name]] = own[keys[name]] = asdict(_unit(config))
        write_atomically(store, json.dumps(own, indent=1, sort_keys=True).encode() + b"\n")
    return {name: Unit(**stored[key]) for name, key in keys.items()}


def _unit(config: Config) -> Unit:
    unit = unit_of(config)
    trains = "optim" in config
    with META:
        parameters = sum(parameter.numel() for parameter in make_model(config).parameters()) if trains else 0
    name = " ".join(filter(None, [config["name"], config.get("method", {}).get("name", "")]))
    seconds = unit.seconds_on(H100[unit.precision])
    return Unit(name, unit.flops, unit.bytes, len(unit.each), unit.images, unit.precision, seconds, parameters)


def unit_of(config: Config) -> Operations:
    """Operations of one unit of the run's work; none for tasks that look at a few images."""
    count = UNITS.get(type(task_of(config)).__name__)
    return count(config) if count else Operations((), 1.0)
