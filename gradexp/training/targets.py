"""What a frozen teacher gives a student."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import filelock
import torch
from torch import Tensor, nn

from gradexp import gradients
from gradexp.data.loader import Batch, Loader
from gradexp.errors import UserError

CHUNK = 256  # views computed at a time
CANARY = 8  # views computed again at the start of every run


class LiveTargets:
    """A teacher in eval mode, run once for every batch; a batch's logits, features and gradients share that run.

    with_gradient: keep the graph of the forward pass, because gradients will be asked for. layers: the names of the
    modules whose outputs, or the gradients there, will be asked for.
    """

    def __init__(self, teacher: nn.Module, *, with_gradient: bool, layers: Sequence[str] = ()) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.with_gradient, self.layers = with_gradient, layers
        self._batch: Batch | None = None
        self._found: dict[str, dict[str, Tensor]] = {}

    def logits(self, batch: Batch) -> Tensor:
        """(B, K)."""
        return self._forward(batch).detach()

    def input_gradient(self, batch: Batch, target: str) -> Tensor:
        """(B, C, H, W), or (B, K, C, H, W) for `all`."""
        if target == "all":
            logits = self._forward(batch)
            return gradients.gradient_of(logits, self._images, batch.labels, target=target, differentiable=False)
        return self._gradients_at(batch, target)[gradients.INPUT]

    def features(self, batch: Batch, layer: str) -> Tensor:
        """(B, c, h, w), of one of `layers`."""
        self._forward(batch)
        return self._features[layer].detach()

    def layer_gradient(self, batch: Batch, layer: str, target: str) -> Tensor:
        """(B, c, h, w), at one of `layers`."""
        return self._gradients_at(batch, target)[layer]

    def _forward(self, batch: Batch) -> Tensor:
        if self._batch is not batch:
            with torch.set_grad_enabled(self.with_gradient), gradients.captured(self.teacher, self.layers) as features:
                self._batch = batch
                self._images = batch.images.detach().requires_grad_(self.with_gradient)
                self._logits = self.teacher(self._images)
            self._features, self._found = features, {}
        return self._logits

    def _gradients_at(self, batch: Batch, target: str) -> dict[str, Tensor]:
        logits = self._forward(batch)
        if target not in self._found:
            values = {gradients.INPUT: self._images, **self._features}
            self._found[target] = gradients.gradients_of(logits, values, batch.labels, target=target, differentiable=False)
        return self._found[target]


class StoredTargets:
    """A frozen teacher's targets for exactly the (image, view) pairs that a training will show, computed once.

    Every method of a table shows the same views of the same images, so all of them, and every repeat of a run,
    share one folder. Logits are kept in float32, input-gradients in bfloat16. They are computed in fixed chunks
    before training starts: what a run reads does not depend on who computed it, or on how often it was interrupted.

    target: whose input-gradient is kept, None to keep logits alone. Raises UserError when stored values are not
    the teacher's.
    """

    def __init__(self, live: LiveTargets, loader: Loader, steps: int, folder: Path, *, target: str | None) -> None:
        self.live, self.loader, self.target = live, loader, target
        self.keys = loader.visited(steps)
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{folder}.lock"):
            first = self._values(0, 1)
            self._logits = _mapped(folder / "logits.f32", (len(self.keys), *first[0].shape[1:]), torch.float32)
            shape = (len(self.keys), *first[1].shape[1:]) if first[1] is not None else (0,)
            self._gradients = _mapped(folder / "gradients.bf16", shape, torch.bfloat16)
            self._fill(folder / "chunks_done.txt")
        self._check(folder)

    def logits(self, batch: Batch) -> Tensor:
        """(B, K) float32."""
        return self._logits[self._slots(batch)].to(batch.images.device)

    def input_gradient(self, batch: Batch, target: str) -> Tensor:
        """(B, C, H, W) bfloat16."""
        if target != self.target:
            return self.live.input_gradient(batch, target)
        return self._gradients[self._slots(batch)].to(batch.images.device)

    def features(self, batch: Batch, layer: str) -> Tensor:
        """(B, c, h, w), not stored."""
        return self.live.features(batch, layer)

    def layer_gradient(self, batch: Batch, layer: str, target: str) -> Tensor:
        """(B, c, h, w), not stored."""
        return self.live.layer_gradient(batch, layer, target)

    def _slots(self, batch: Batch) -> Tensor:
        return torch.searchsorted(self.keys, self.loader.key(batch.row, batch.view))

    def _values(self, start: int, end: int) -> tuple[Tensor, Tensor | None]:
        keys = self.keys[start:end]
        batch = self.loader.batch(keys // self.loader.views, keys % self.loader.views)
        gradient = self.live.input_gradient(batch, self.target).cpu() if self.target else None
        return self.live.logits(batch).float().cpu(), gradient

    def _fill(self, done_file: Path) -> None:
        done = int(done_file.read_text()) if done_file.exists() else 0
        chunks = -(-len(self.keys) // CHUNK)
        if done < chunks:
            print(f"teacher targets: computing {len(self.keys)} views once", flush=True)
        for chunk in range(done, chunks):
            span = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
            logits, gradient = self._values(span.start, span.stop)
            self._logits[span] = logits
            if gradient is not None:
                self._gradients[span] = gradient.to(torch.bfloat16)
            draft = done_file.with_suffix(".draft")
            draft.write_text(str(chunk + 1))
            draft.replace(done_file)

    def _check(self, folder: Path) -> None:
        """A canary: the first chunk's head and the last one's are computed again."""
        for start in {0, max(0, len(self.keys) - CANARY)}:
            span = slice(start, start + CANARY)
            logits, gradient = self._values(span.start, span.stop)
            good = torch.allclose(logits, self._logits[span], rtol=0.05, atol=0.05 * float(logits.abs().max()))
            if gradient is not None:
                size = float(gradient.float().norm())
                good &= float((gradient.float() - self._gradients[span].float()).norm()) <= 0.05 * size
            if not good:
                raise UserError(f"stored teacher targets in {folder} are not this teacher's; delete that folder")


def _mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    count = math.prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.from_file(str(path), shared=True, size=count, dtype=dtype).view(shape)
