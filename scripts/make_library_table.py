"""Checks FullGrad and accelerate on torchvision's classifiers, and writes the table of docs/library.md.

One architecture after another, the smallest first. Each row is stored in results/library.csv when it is computed, and an
architecture with a row is not computed again; `--again NAME` computes its row anew.
"""

from __future__ import annotations

import argparse
import gc
import math
import re
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import gradexp
from gradexp import gradients
from gradexp.base.errors import UserError
from gradexp.base.files import write_atomically
from gradexp.engine.exits import exit_on_errors
from gradexp.engine.run import ROOT
from gradexp.layers import only_inputs
from gradexp.report.writing import table_lines

ROWS = ROOT / "results" / "library.csv"
PAGE = ROOT / "docs" / "library.md"
COLUMNS = ("architecture", "parameters", "fullgrad", "error", "outside", "accelerate")
SIZE = 224  # pixels, for FullGrad
SMALL = 64  # pixels, for second derivatives; an attention over windows of fixed number needs SIZE
OTHER_SIZES = {"inception_v3": 96, "maxvit_t": SIZE, "vit_h_14": 70}
SMALLEST = 1e-7  # error that is shown: smaller ones are rounding of float32
ROUNDING = 1e-10  # gradients so much smaller than the largest one are rounding, such as those of a bias before a normalisation


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=float, default=100, help="largest number of parameters, in millions (default: 100)")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="these architectures")
    parser.add_argument("--again", nargs="*", default=[], metavar="NAME", help="compute these rows anew")
    parser.add_argument("--render-only", action="store_true", help="write the table from the rows that exist")
    given = parser.parse_args(words)
    with exit_on_errors():
        sizes = parameter_counts()
        if unknown := {*(given.only or ()), *given.again} - sizes.keys():
            raise UserError(f"torchvision has no classifier {', '.join(sorted(unknown))}")
        rows = {name: row for name, row in read(ROWS).items() if name not in given.again}
        for name in [] if given.render_only else sizes:
            if name not in rows and sizes[name] <= given.limit * 1e6 and name in (given.only or sizes):
                rows[name] = row_of(name, sizes[name])
                print(*rows[name].values(), sep="  ", flush=True)
                write_atomically(ROWS, to_csv(rows).encode())
                gc.collect()
        write_table(PAGE, rows, sizes)


def parameter_counts() -> dict[str, int]:
    """{architecture: number of parameters}, the smallest first."""
    names = torchvision.models.list_models(module=torchvision.models)
    counts = {name: next(iter(torchvision.models.get_model_weights(name))).meta["num_params"] for name in names}
    return dict(sorted(counts.items(), key=lambda item: item[1]))


# --- rows ---------------------------------------------------------------------------------------------------


def row_of(name: str, parameters: int) -> dict[str, str]:
    row = {"architecture": name, "parameters": str(parameters)}
    try:
        row |= full_gradients(name)
    except Exception as error:
        row |= {"fullgrad": first_line(error), "error": "", "outside": ""}
    try:
        row["accelerate"] = f"{max(difference(name, training) for training in (False, True)):.1e}"
    except Exception as error:
        row["accelerate"] = first_line(error)
    return row


def full_gradients(name: str) -> dict[str, str]:
    """Columns about FullGrad of one image of noise, in float32."""
    model = perturbed(network(name)).eval()
    images = torch.randn(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        full = gradients.full_gradient(model, images, torch.zeros(1, dtype=torch.long), target="top")
        error, outside = float(full.error()), float(full.outside() / full.output)
        del full
        warnings.filterwarnings("ignore", message=".*no spatial location")  # which is in the table
        saliency = gradexp.FullGrad()(model, images)
    drawn = (
        saliency.shape == (1, 1, SIZE, SIZE) and saliency.isfinite().all() and saliency.flatten().diff().count_nonzero() > SIZE
    )
    return {"fullgrad": "yes" if drawn else "the map is constant", "error": f"{error:.1e}", "outside": f"{outside:.4f}"}


def difference(name: str, training: bool) -> float:
    """The largest difference that `accelerate` makes to a parameter's gradient of a gradient penalty, relative to its norm."""
    with sdpa_kernel(SDPBackend.MATH), tempfile.TemporaryDirectory() as folder:
        # One after the other, the first one's gradients on disk: memory holds one of two large networks.
        torch.save(penalised(name, training, twice_differentiable), file := Path(folder) / "expected.pt")
        gc.collect()
        found, expected = penalised(name, training, gradexp.accelerate), torch.load(file, mmap=True)
        smallest = ROUNDING * max(float(gradient.norm()) for gradient in expected.values())
        return max(
            float((found[key] - gradient).norm() / gradient.norm())
            for key, gradient in expected.items()
            if float(gradient.norm()) > smallest
        )


def network(name: str, size: int = SIZE) -> nn.Module:
    options: dict[str, Any] = {"image_size": size} if name.startswith("vit") else {}
    if name in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": False}
    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None, **options)


def perturbed(model: nn.Module) -> nn.Module:
    """Random biases, scales and running statistics, so that nothing is 0 or 1; no dropout."""
    for key, value in model.named_parameters():
        if value.ndim == 1 or not value.any():
            value.data.add_(0.1 * torch.randn_like(value))
        elif "layer_scale" in key:
            value.data.fill_(0.5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 1.5)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


class TwiceHardsigmoid(nn.Module):
    """torch's own Hardsigmoid has one derivative."""

    def forward(self, x: Tensor) -> Tensor:
        return ((x + 3) / 6).clamp(0, 1)


def twice_differentiable(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        for key, child in module.named_children():
            if type(child) is nn.Hardsigmoid:
                setattr(module, key, TwiceHardsigmoid())
    return model


def penalised(name: str, training: bool, prepare: Callable[[nn.Module], nn.Module]) -> dict[str, Tensor]:
    """Gradients of the parameters of a loss with a gradient penalty, relative to the input-gradient's own size."""
    size = OTHER_SIZES.get(name, SMALL)
    model = prepare(perturbed(network(name, size)).double()).train(training)
    images = torch.randn(2, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).requires_grad_()
    torch.manual_seed(3)  # for stochastic depth
    with only_inputs():
        logits = model(images)
        # All logits: the ReLU of one may be dead, as in SqueezeNet with random weights.
        (gradient,) = torch.autograd.grad((logits * torch.randn_like(logits[0])).sum(), images, create_graph=True)
    (gradient / gradient.detach().norm() - 0.01).square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__


# --- files --------------------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, dict[str, str]]:
    rows: list[Any] = pd.read_csv(path, dtype=str, keep_default_na=False).to_dict("records") if path.exists() else []
    return {row["architecture"]: row for row in rows}


def to_csv(rows: dict[str, dict[str, str]]) -> str:
    return pd.DataFrame([row for _, row in sorted(rows.items())], columns=COLUMNS).to_csv(index=False)


def table(rows: dict[str, dict[str, str]], sizes: dict[str, int]) -> list[str]:
    """The table in Markdown, and a line about the architectures that have no row."""
    frame = pd.DataFrame(
        {
            "Architecture": name,
            "Parameters": f"{sizes[name] / 1e6:.1f} M",
            "FullGrad": row["fullgrad"],
            "Completeness error": f"< {SMALLEST:.0e}" if row["error"] and float(row["error"]) < SMALLEST else row["error"],
            "Without location": f"{100 * float(row['outside']):.1f} %" if row["outside"] else "",
            "`accelerate`": row["accelerate"],
        }
        for name, row in sorted(rows.items())
    )
    lines = table_lines(list(frame.columns), frame.to_numpy().tolist())
    left = [f"{name} ({math.floor(size / 1e6)} M)" for name, size in sizes.items() if name not in rows]
    return [*lines, "", f"Not computed (parameters in brackets): {', '.join(left)}."] if left else lines


def write_table(page: Path, rows: dict[str, dict[str, str]], sizes: dict[str, int]) -> None:
    """Puts the table between the page's two markers. Raises UserError where the page has none."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    if not re.search(MARKED, text):
        raise UserError(f"{page} has no markers {START} and {END} for the table")
    content = between(table(rows, sizes))
    write_atomically(page, re.sub(MARKED, lambda _: content, text).encode())


START, END = "<!-- architectures -->", "<!-- end of architectures -->"
MARKED = re.compile(f"{re.escape(START)}.*?{re.escape(END)}", re.DOTALL)


def between(lines: Sequence[str]) -> str:
    return "\n".join([START, "", *lines, "", END])


if __name__ == "__main__":
    main()
