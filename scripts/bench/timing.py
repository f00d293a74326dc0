"""How the benchmarks measure time and memory."""

from __future__ import annotations

import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

import torch

from gradexp.engine.clocks import peak_memory_mib

Name = TypeVar("Name")


def medians(
    functions: Mapping[Name, Callable[[], Any]], *, rounds: int, cuda: bool, budget: float = math.inf
) -> tuple[dict[Name, float], int]:
    """Median seconds of each function, and how many samples they are of.

    In each of `rounds` rounds every function is called once, so that drifts hit all alike; a round before the first warms
    up. No round begins once `budget` seconds are over.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in functions}
    started = time.monotonic()
    for number in range(rounds + 1):
        if number > 1 and time.monotonic() - started > budget:
            break
        for name, function in functions.items():
            begun = time.perf_counter()
            function()
            if cuda:
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}, min(map(len, seconds.values())) - 1


def peak_memory(function: Callable[..., None], *args: Any) -> int:
    """MiB that a process of its own reaches in function(*args): of the GPU where there is one.

    The processes are forked from a server that has imported everything and done nothing: each starts in a moment.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(_measured, function, args).result()


def _measured(function: Callable[..., None], args: tuple[Any, ...]) -> int:
    function(*args)
    return torch.cuda.max_memory_allocated() // 2**20 if torch.cuda.is_available() else peak_memory_mib()
