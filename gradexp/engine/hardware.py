"""Where and how a run computes. Nothing here is part of its identity."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from typing import Any, Literal

import torch
from joblib import cpu_count
from torch import nn

from gradexp.base.errors import UserError
from gradexp.base.ranges import Count, NonNegative

LIGHTNING_PRECISION = {"32": "32-true", "bf16": "bf16-mixed"}


def native_bf16(kind: str) -> bool:
    """Whether the device, `cpu` or `gpu`, multiplies bf16 in hardware."""
    if kind == "gpu":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(torch.cpu.get_capabilities().get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def _keep_memory() -> None:
    """Makes glibc, if there is one, keep freed memory for the next step, which allocates the same tensors again.

    By default it returns large blocks to the system, and touching them anew costs more than filling them: a Jacobian step of
    VGG-4 in fp32 takes a tenth longer.
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    with suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


class Hardware:
    """Device, precision and memory layout of a run.

    devices: the number of processes that train together on each of `num_nodes` machines (engine/fit.py); `auto` for
    all GPUs. precision: `32`, `bf16`, or `auto` (bf16 where the device computes it natively). checkpoint_every: seconds.
    strict: deterministic algorithms. threads: CPU threads of a process, None for torch's choice. store_gib: the size up to
    which a teacher's targets are computed once for all views and stored in memory-mapped files.
    """

    def __init__(
        self,
        *,
        accelerator: Literal["auto", "cpu", "gpu"],
        devices: Count | Literal["auto"],
        num_nodes: Count,
        precision: Literal["auto", "bf16", "32", 32],
        channels_last: bool,
        checkpoint_every: NonNegative,
        store_gib: NonNegative,
        threads: Count | None,
        strict: bool,
    ) -> None:
        self.kind = ("gpu" if torch.cuda.is_available() else "cpu") if accelerator == "auto" else accelerator
        if self.kind == "gpu" and not torch.cuda.is_available():
            raise UserError("trainer.accelerator=gpu: torch sees no GPU here; use trainer.accelerator=cpu")
        wanted = ("bf16" if native_bf16(self.kind) else "32") if precision == "auto" else str(precision)
        if wanted == "bf16" and not native_bf16(self.kind):
            # Emulated, it is many times slower than fp32, and convolutions of torch 2.14 have corrupted memory.
            raise UserError("trainer.precision=bf16: this processor has no bf16 arithmetic; use 32 or auto")
        self.precision, self.channels_last, self.checkpoint_every = wanted, channels_last, checkpoint_every
        self.store_gib, self.threads, self.num_nodes, self.strict = store_gib, threads, num_nodes, strict
        self.devices = (torch.cuda.device_count() if self.kind == "gpu" else 1) if devices == "auto" else int(devices)
        if self.kind == "gpu" and self.devices > torch.cuda.device_count():
            raise UserError(f"trainer.devices={devices}: this machine has {torch.cuda.device_count()} GPUs")
        self.together = self.devices * num_nodes
        self.is_part = "TORCHELASTIC_RUN_ID" in os.environ
        self.rank, local = (int(os.environ[name]) if self.is_part else 0 for name in ("RANK", "LOCAL_RANK"))
        self.device = torch.device("cuda", local) if self.kind == "gpu" else torch.device("cpu")

    def apply(self) -> None:
        """Applies the settings to this process. Raises UserError for several machines outside a SLURM job."""
        if self.num_nodes > 1 and "SLURM_JOB_NODELIST" not in os.environ:
            raise UserError(
                f"trainer.num_nodes={self.num_nodes} needs a SLURM job of {self.num_nodes} machines; see docs/cluster.md"
            )
        if self.threads or self.is_part:
            torch.set_num_threads(self.threads_of_each())
        if not self.is_part:
            from lightning.pytorch.utilities import rank_zero_only

            vars(rank_zero_only)["rank"] = 0  # Lightning believes RANK and SLURM's variables, and another rank writes no logs
        if self.strict:  # CUBLAS_WORKSPACE_CONFIG, which CUDA reads when it starts, is set by gradexp.engine.exits
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
        # A trace estimate multiplies the difference of two logits by 2/σ² (Eq. 5.9), of which TF32, the default of a GPU's
        # convolutions with 10 of 23 bits of mantissa, would leave rounding errors.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        # In torch 2.14 on x86 with AVX-512, softplus and log1p take a slow path (6.2 ns an element, not 0.65) until pow
        # has once been applied to a vector of numbers.
        torch.full((256,), 2.0).pow(1.5)
        _keep_memory()

    def threads_of_each(self) -> int:
        """CPU threads of each of the processes that train together."""
        return self.threads or max(1, cpu_count() // self.devices)

    def place(self, model: nn.Module) -> nn.Module:
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return model.to(self.device).to(memory_format=layout)

    def trainer_options(self) -> dict[str, Any]:
        """Options of Lightning's Trainer. They include the environment, which it would otherwise infer from SLURM's job."""
        # Imported here: make plan needs the class, and Lightning takes seconds.
        from lightning.fabric.plugins.environments.lightning import LightningEnvironment
        from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
        from lightning.pytorch.strategies import DDPStrategy

        options = {"accelerator": self.kind, "precision": LIGHTNING_PRECISION[self.precision]}
        if not self.is_part:
            return {**options, "devices": 1, "plugins": [LightningEnvironment()]}
        backend = "nccl" if self.kind == "gpu" else "gloo"
        # Not every method uses every parameter; buffers are the same everywhere by construction (gradexp/layers/ranks.py).
        strategy = DDPStrategy(find_unused_parameters=True, broadcast_buffers=False, process_group_backend=backend)
        nodes = {"devices": self.devices, "num_nodes": self.num_nodes}
        return {**options, **nodes, "strategy": strategy, "plugins": [TorchElasticEnvironment()]}

    def autocast(self) -> torch.autocast:
        """The autocast context that Lightning uses for a training step."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def facts(self, *, mixed: bool = True) -> dict[str, Any]:
        """The fields of a record about the machine, without its name. mixed: whether it computed under `autocast`."""
        if self.kind == "gpu":
            name = torch.cuda.get_device_name()
        else:  # with its instructions: `AMD EPYC` alone may be processors of very different speed
            name, instructions = torch.cpu.get_capabilities().get("cpu_name", "cpu"), torch.backends.cpu.get_cpu_capability()
            name += f" ({instructions}{', bf16' if native_bf16('cpu') else ''})"
        facts = {"device": name, "precision": self.precision if mixed else "32", "threads": torch.get_num_threads()}
        if self.kind == "gpu":
            facts["peak_gpu_memory_mib"] = torch.cuda.max_memory_allocated() // 2**20
        return facts | ({"strict": True} if self.strict else {})
