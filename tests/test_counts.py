"""Operation counts, and the estimates that the plan makes of them where nothing was measured."""

import dataclasses
import json
from hashlib import sha256

import operations
import plan
import pytest
import torch
from torch import nn

from gradexp.engine import build
from gradexp.engine.assemble import declare_hardware
from gradexp.engine.compose import compose_run
from gradexp.engine.task import task_of
from gradexp.report import costs
from gradexp.report.costs import History, Sample


def test_a_convolution_is_counted() -> None:
    """2 · 3 · 3 · 3 · 8 operations for each of 16 · 16 positions and 4 images; each tensor read or written once."""
    with operations.META:
        layer, images = nn.Conv2d(3, 8, 3, padding=1, bias=False), torch.zeros(4, 3, 16, 16)
    counted = operations.counted(lambda: layer(images), 4)
    assert counted.flops == 2 * 27 * 8 * 256
    assert counted.bytes == 4 * (27 * 8 / 4 + 3 * 256 + 8 * 256)


def test_an_operation_takes_the_longest_of_arithmetic_memory_and_launch() -> None:
    gpu = operations.Processor("", tflops=1, gbytes=1, launch=1e-6, share=0.5)
    each = ((1e12, 0.0), (0.0, 1e9), (0.0, 0.0))
    assert operations.Operations(each, 2.0).seconds_on(gpu) == pytest.approx((2 + 2 + 1e-6) / 2)


@pytest.mark.parametrize("words", [["experiment=teacher"], ["experiment=jacobian_distill", "method=ce_j"]])
def test_jacobians_double_the_operations_of_a_step(words: list[str]) -> None:
    """2.0 with stored targets (docs of gradexp.layers); here the teacher's two passes are counted too."""
    plain = operations.unit_of(compose_run(["experiment=teacher", "model=vgg4", "scale=cpu"]))
    other = operations.unit_of(compose_run([*words, "model=vgg4", "scale=cpu"]))
    if words[0] == "experiment=teacher":
        assert other.flops == plain.flops
    else:
        teacher = operations.forward({**compose_run([*words, "scale=cpu"])}, "teacher").flops
        assert (other.flops - 2 * teacher) / plain.flops == pytest.approx(2, rel=0.1)


def test_a_record_with_the_former_name_of_its_task_is_counted() -> None:
    """The cost of a training with such a record corrects the counts of others."""
    config = compose_run(["experiment=teacher", "model=vgg4", "scale=cpu"])
    former = config | {"task": config["task"] | {"_target_": build.FORMER[config["task"]["_target_"]]}}
    assert costs.signature(former) == costs.signature(config)
    assert operations.unit_of(former).flops == operations.unit_of(config).flops > 0


def test_a_count_of_zero_corrects_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    known, unknown = (compose_run(["experiment=teacher", f"model={name}", "scale=cpu"]) for name in ("vgg4", "vgg9"))
    name, other = costs.signature(known), costs.signature(unknown)
    history = History(samples={name: [Sample(name, 1.0, 5.0, 5.0, 1.0, 1.0, "")]}, configs={name: known}, device="")
    unit = operations.Unit("", 1e9, 1e9, 1, 1.0, "32", 1e-3, 1)
    monkeypatch.setattr(operations, "counts", lambda _: {name: dataclasses.replace(unit, flops=0.0), other: unit})
    plan.count([unknown], history, declare_hardware(unknown))
    assert history.counts[other].rate == 1e9 / plan.CORE_FLOPS


def test_stored_counts_are_those_of_today() -> None:
    config = compose_run(["experiment=teacher", "scale=paper"])
    stored = json.loads(operations.STORE.read_text())
    key = sha256(costs.signature(config).encode()).hexdigest()[:12]
    assert stored[key]["flops"] == operations.unit_of(config).flops


def test_a_count_is_used_where_nothing_was_measured() -> None:
    config = compose_run(["experiment=teacher", "scale=quick", "optim.passes=null", "optim.steps=10"])
    name, facts = costs.signature(config), {"memory_mib": 1.0, "disk_mib": 2.0}
    history = History(sizes={"digits": (1437, 360)}, counts={name: Sample(name, 1.0, 21.0, 0.1, device="", **facts)})
    cost = history.cost(config)
    size = task_of(config).work(config, history.sizes)
    assert cost is not None and size is not None
    assert (cost.basis, cost.seconds) == ("count", pytest.approx(20.9 + 0.1 * size))
    history.add(Sample(name, 1.0, 5.0, 5.0, device="", **facts))
    assert history.cost(config).basis == "record"  # type: ignore[union-attr]
