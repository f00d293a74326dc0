"""Chapter 2's transfer (§2.5, §2.6.3, §2.11): its terms against loops and Monte-Carlo, its theory, its runs."""

import copy
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from scipy.spatial.distance import directed_hausdorff
from torch import Tensor, nn
from torch.nn import functional

from gradexp import gradients, layers
from gradexp.base.errors import UserError
from gradexp.data.loader import Batch
from gradexp.engine.build import build
from gradexp.engine.compose import compose_run
from gradexp.engine.ensure import ensure
from gradexp.engine.run import Paths, Run
from gradexp.models.vgg import VGG, TwoHeadedVGG
from gradexp.terms import Activations, AttentionJacobian, Jacobian, Step
from gradexp.terms.attention_jacobian import pooled, window_size
from gradexp.terms.targets import Targets
from gradexp.training.transfer import Transfer

LAYERS = ["features.relu1", "features.relu3"]
OPTIONS: dict[str, Any] = {"student_layers": LAYERS, "teacher_layers": LAYERS, "student_bn": "batch"}


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = VGG(name="tiny", layers=[4, "M", 5, 6], width=1, channels=2, classes=3, dropout=None).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    return model.eval()


def batch(count: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(count, 2, 8, 8, dtype=torch.float64, generator=generator)
    return Batch(images, torch.zeros(count, dtype=torch.long), torch.arange(count), torch.zeros(count, dtype=torch.long))


def value(student: nn.Module, teacher: nn.Module, level: int, window: str, **changes: str) -> Tensor:
    term = AttentionJacobian(weight=1, level=level, window=window, **(OPTIONS | changes))
    live = Targets(copy.deepcopy(teacher), with_gradient=True, layers=term.teacher_layers)
    return term(Step(batch(), student, live, differentiable_input=True, student_layers=term.student_layers))


def attention(model: nn.Module, image: Tensor, depth: int, window: int) -> Tensor:
    """The pooled attention map of one image (Eq. 2.7), pixel by pixel: (positions,)."""
    features = model.features[:depth](image[None])[0]  # type: ignore[index]
    squares = features.square().sum(0)
    side = squares.shape[0] - window + 1
    return torch.stack([squares[i : i + window, j : j + window].mean() for i in range(side) for j in range(side)])


@pytest.mark.parametrize(("level", "depth", "window", "pixels"), [(1, 3, "s/3", 2), (1, 3, "none", 1), (2, 10, "full", 4)])
def test_the_attention_jacobian_is_equation_2_9(level: int, depth: int, window: str, pixels: int) -> None:
    """Twice one minus the cosine of the input-gradients of the teacher's largest pooled pixel."""
    student, teacher = net(0), net(1)
    distances = []
    for image in batch().images:
        largest = int(attention(teacher, image, depth, pixels).argmax())
        gradients = []
        for model in (student, teacher):
            x = image.clone().requires_grad_()
            gradients.append(torch.autograd.grad(attention(model, x, depth, pixels)[largest], x)[0].flatten())
        distances.append(2 * (1 - functional.cosine_similarity(*gradients, dim=0)))
    torch.testing.assert_close(value(student, teacher, level, window), torch.stack(distances).mean(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("student_bn", ["batch", "running"])
def test_fast_layers_give_the_attention_jacobian_autograds_gradients(student_bn: str) -> None:
    """The attention pixel's input-gradient is differentiated once more, from the middle of the network."""
    student, teacher = net(0).train(), net(1)
    found = []
    for faster in (copy.deepcopy, lambda model: layers.accelerate(copy.deepcopy(model))):
        mine = faster(student)
        value(mine, faster(teacher), 1, "s/3", student_bn=student_bn).backward()
        found.append({name: parameter.grad for name, parameter in mine.named_parameters() if parameter.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert any(gradient.abs().max() > 1e-3 for gradient in found[0].values())
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-11)


def test_the_attention_jacobian_vanishes_for_a_student_that_is_its_teacher() -> None:
    assert value(net(0), net(0), 1, "s/3") < 1e-20
    assert value(net(0), net(1), 1, "s/3") > 1e-3


def test_the_attention_jacobian_with_running_statistics_is_that_of_eval_mode() -> None:
    student, teacher = net(0), net(1)
    tested = value(student, teacher, 1, "s/3")
    student.train()
    torch.testing.assert_close(value(student, teacher, 1, "s/3", student_bn="running"), tested)
    assert student.training
    assert not torch.isclose(value(student, teacher, 1, "s/3"), tested, rtol=1e-3)


def test_equation_2_9_is_squared_error_under_noise() -> None:
    """§2.11: noise of deviation sigma / |gradient|, the same draw for both networks, makes their responses differ by sigma^2
    times Eq. 2.9; either response alone has variance sigma^2, whatever the size of its gradient."""
    sigma, image, depth = 1e-4, batch(1).images, 3
    student, teacher = net(0), net(1)
    largest = int(attention(teacher, image[0], depth, 2).argmax())

    def pixel(model: nn.Module, images: Tensor) -> Tensor:
        squares = model.features[:depth](images).square().sum(1)  # type: ignore[index]
        return squares.unfold(1, 2, 1).unfold(2, 2, 1).mean((3, 4)).flatten(1)[:, largest]

    draws = torch.randn(8000, *image.shape[1:], dtype=torch.float64)
    moves = []
    for model in (student, teacher):
        x = image.clone().requires_grad_()
        noise = sigma * draws / torch.autograd.grad(pixel(model, x).sum(), x)[0].norm()
        with torch.no_grad():
            moves.append((pixel(model, image + noise) - pixel(model, image - noise)) / 2)
        each = moves[-1].square() / sigma**2
        assert abs(each.mean() - 1) < 4 * each.std() / len(draws) ** 0.5
    apart = (moves[0] - moves[1]).square() / sigma**2
    error = apart.std() / len(draws) ** 0.5
    term = AttentionJacobian(weight=1, level=1, window="2", **OPTIONS)
    live = Targets(teacher, with_gradient=True, layers=term.teacher_layers)
    one = Step(batch(1), student, live, differentiable_input=True, student_layers=term.student_layers)
    assert error < 0.05 * term(one)
    assert abs(apart.mean() - term(one)) < 4 * error


@pytest.mark.parametrize("student_bn", ["batch", "running"])
def test_the_output_jacobian_is_that_of_the_teachers_largest_logit_at_the_students_second_head(student_bn: str) -> None:
    """LwF (§2.5.1): the student has other classes; its own largest logit and the label are of other indices here."""
    torch.manual_seed(4)
    student = TwoHeadedVGG(source_classes=5, name="tiny", layers=[4, "M", 5], width=1, channels=2, classes=3, dropout=None)
    teacher = VGG(name="tiny", layers=[6, "M", 4], width=1, channels=2, classes=5, dropout=None).double().eval()
    teacher.linear.bias.data[1] += 5
    student.double().train()
    data = batch()
    term = Jacobian(weight=1, reduction="sum", target="top", student_bn=student_bn, head="source")
    term.resolve_layers(student, teacher, data.images)
    live = Targets(copy.deepcopy(teacher), with_gradient=True)
    value = term(Step(data, student, live, differentiable_input=True, student_layers=term.student_layers)).item()

    images = data.images.clone().requires_grad_()
    mine = copy.deepcopy(student).train(student_bn == "batch")
    hidden = mine.hidden(images)
    slope, theirs = (torch.autograd.grad(out[:, 1].sum(), images)[0] for out in (mine.source(hidden), teacher(images)))
    assert teacher(images).argmax(1).tolist() == [1, 1, 1]
    assert 1 not in mine.source(hidden).argmax(1)
    assert value == pytest.approx((slope - theirs).square().sum().item() / 3, rel=1e-9)
    with pytest.raises(UserError, match="target=label: head=source has the teacher's classes, not the labels'"):
        Jacobian(weight=1, reduction="sum", target="label", student_bn=student_bn, head="source")


def test_a_term_on_one_head_may_stand_beside_a_gradient_of_the_other() -> None:
    """The logits do not depend on the source head, so that they have no gradient there."""
    torch.manual_seed(4)
    student = TwoHeadedVGG(source_classes=5, name="tiny", layers=[4, "M", 5], width=1, channels=2, classes=3, dropout=None)
    student.double().train()
    step = Step(batch(), student, differentiable_input=True, student_layers=["source", "features.relu1"])
    found = step.student_layer_gradients("label", "batch")
    assert list(found) == [gradients.INPUT, "features.relu1"]
    assert step.student_features("source").shape == (3, 5)


def test_the_attention_map_against_a_loop() -> None:
    features = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    by_hand = torch.zeros(2, 4, 5, dtype=torch.float64)
    for b, c, i, j in np.ndindex(*features.shape):
        by_hand[b, i, j] += features[b, c, i, j] ** 2
    torch.testing.assert_close(gradients.attention_map(features), by_hand)


def test_pooling_against_a_loop() -> None:
    maps = torch.randn(2, 5, 5, dtype=torch.float64)
    by_hand = [[maps[b, i : i + 2, j : j + 2].mean() for i in range(4) for j in range(4)] for b in range(2)]
    torch.testing.assert_close(pooled(maps, "2"), torch.tensor(by_hand, dtype=torch.float64))


def test_window_sizes() -> None:
    assert [window_size(w, 16) for w in ("full", "s/3", "s/5", "s/7", "none", 4)] == [16, 5, 3, 2, 1, 4]
    with pytest.raises(UserError, match="only 8x8 pixels"):
        window_size(9, 8)
    with pytest.raises(UserError, match="full, none, s/N"):
        window_size("half", 8)


def test_layers_that_cannot_be_matched_are_errors_before_training() -> None:
    images = batch(1).images
    term = AttentionJacobian(weight=1, level=2, window=5, **OPTIONS)
    with pytest.raises(UserError, match="window=5: the attention map has only 4x4 pixels; take a smaller window"):
        term.resolve_layers(net(0), net(1), images)
    term = AttentionJacobian(weight=1, level=1, window="s/5", **{**OPTIONS, "teacher_layers": LAYERS[::-1]})
    with pytest.raises(UserError, match=r"features\.relu1 has 8x8 positions, the teacher's features\.relu3 4x4"):
        term.resolve_layers(net(0), net(1), images)
    with pytest.raises(UserError, match="level=3: it must be from 1 to 2"):
        AttentionJacobian(weight=1, level=3, window="s/5", **OPTIONS)


@pytest.mark.parametrize(("scale", "sizes"), [("paper", [56, 28, 14, 7]), ("cpu", [16, 8, 4, 2]), ("quick", [16, 8, 4, 2])])
def test_depths_are_those_of_table_2_4_and_maps_have_common_sizes(scale: str, sizes: list[int]) -> None:
    """ResNet-34 and VGG-9 on the meta device: number of convolutions before each map, and its rows and columns."""
    config = compose_run(["experiment=jacobian_transfer", f"scale={scale}"])
    term, size = config["method"]["terms"]["attention"], config["data"]["size"]
    depths = []
    for model, names in (
        (config["upstream"]["teacher"]["model"], term["teacher_layers"]),
        (config["model"], term["student_layers"]),
    ):
        with torch.device("meta"):
            network, images = build(model, where="model").eval(), torch.zeros(2, 3, size, size)
        found = _convolutions_in_front(network, names, images)
        assert [shape for _, shape in found] == [(side, side) for side in sizes]
        depths.append([count for count, _ in found])
    assert list(zip(*depths, strict=True)) == [(7, 2), (15, 4), (27, 6), (33, 8)]


def _convolutions_in_front(network: nn.Module, layers: list[str], images: Tensor) -> list[tuple[int, tuple[int, ...]]]:
    """(3x3 and 7x7 convolutions that have run, spatial size) at the output of each layer; 1x1 shortcuts are no depth."""
    count = 0
    found: dict[str, tuple[int, tuple[int, ...]]] = {}

    def see(name: str, module: nn.Module, output: Tensor) -> None:
        nonlocal count
        count += isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)
        found[name] = (count, tuple(output.shape[2:]))

    for name, module in network.named_modules():
        module.register_forward_hook(lambda module, _, output, name=name: see(name, module, output))
    network(images)
    return [found[layer] for layer in layers]


# --- Proposition 3: LwF bounds distillation on the source --------------------------------------------------


def hausdorff(source: Tensor, target: Tensor) -> float:
    """Eq. 2.5: the largest distance of a point of the source to its nearest one of the target."""
    return float(directed_hausdorff(source.numpy(), target.numpy())[0])


class Linear(nn.Module):
    """Images (B, 1, 1, 2) -> two logits, one of which is 0."""

    def __init__(self, slope: Tensor) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, images: Tensor) -> Tensor:
        return functional.pad((images.flatten(1) @ self.slope)[:, None], (0, 1))


def matched(points: Tensor, student: nn.Module, teacher: nn.Module) -> Tensor:
    """The activation term over these points (N, 2): the LwF loss, a mean."""
    rows = torch.arange(len(points))
    one = Step(Batch(points[:, None, None], 0 * rows, rows, 0 * rows), student, Targets(teacher, with_gradient=False))
    return Activations(weight=1, reduction="sum")(one)


def worst(points: Tensor, student: nn.Module, teacher: nn.Module) -> float:
    """The largest loss on one of the points."""
    return max(matched(point[None], student, teacher).item() for point in points)


def pair(generator: torch.Generator) -> tuple[Linear, Linear, float]:
    """Student, teacher, and the Lipschitz constant of rho = (d'x)^2 on the unit disc: 2 |d|^2, d the difference of slopes."""
    slopes = torch.randn(2, 2, dtype=torch.float64, generator=generator)
    return Linear(slopes[0]), Linear(slopes[1]), 2 * (slopes[0] - slopes[1]).square().sum().item()


def test_proposition_3_bounds_the_loss_on_the_source() -> None:
    generator = torch.Generator().manual_seed(5)
    for _ in range(40):
        student, teacher, lipschitz = pair(generator)
        points = torch.randn(12, 2, dtype=torch.float64, generator=generator)
        source, target = torch.split(points / points.norm(dim=1, keepdim=True).clamp(min=1), [8, 4])
        bound = worst(target, student, teacher) + lipschitz * hausdorff(source, target)
        assert matched(source, student, teacher).item() <= bound


def test_proposition_3_is_tight_and_needs_each_of_its_parts() -> None:
    """In the direction of fastest growth the bound is met up to the square of the distance, and exceeded without any part."""
    generator = torch.Generator().manual_seed(6)
    for _ in range(10):
        student, teacher, lipschitz = pair(generator)
        edge = functional.normalize(student.slope - teacher.slope, dim=0)[None]
        distance = 0.01
        near = (1 - distance) * edge
        loss, bound = matched(edge, student, teacher).item(), worst(near, student, teacher) + lipschitz * distance
        assert hausdorff(edge, near) == pytest.approx(distance, rel=1e-9)
        assert bound - loss == pytest.approx(distance**2 * lipschitz / 2, rel=1e-6)
        target = torch.cat([near, 0 * edge])
        assert worst(target, student, teacher) == worst(near, student, teacher)
        assert loss > matched(target, student, teacher).item() + lipschitz * distance  # the mean in the place of the maximum
        assert loss > worst(target, student, teacher) + 0.9 * lipschitz * hausdorff(edge, target)  # a smaller constant
        source = torch.cat([edge, 0 * edge])
        assert hausdorff(0 * edge, source) == 0  # the distance of the target from the source, which is Eq. 2.5 turned round
        assert matched(source, student, teacher).item() > worst(0 * edge, student, teacher) == 0


def test_noise_on_the_target_reduces_its_distance_but_need_not_tighten_the_bound() -> None:
    """The corollary is of the distance; the other summand, the largest loss on the target, can only grow with more points.

    Of the symmetric distance of two sets it is not true: a new point that is far from the source adds to it.
    """
    generator = torch.Generator().manual_seed(7)
    nearer, looser = 0, 0
    for _ in range(40):
        student, teacher, lipschitz = pair(generator)
        source, target, noise = 0.3 * torch.randn(3, 6, 2, dtype=torch.float64, generator=generator)
        before, after = (hausdorff(source, points) for points in (target, torch.cat([target, target + noise / 3])))
        assert after <= before
        nearer += after < before
        bounds = [
            worst(points, student, teacher) + lipschitz * hausdorff(source, points)
            for points in (target, torch.cat([target, target + noise / 3]))
        ]
        looser += bounds[1] > bounds[0]
        far = torch.cat([target, target[:1] + 9])
        assert hausdorff(source, far) <= before
        assert hausdorff(far, source) > hausdorff(target, source)
    assert nearer >= 20
    assert looser > 0


# --- runs -------------------------------------------------------------------------------------------------


def test_a_transfer_run(run_py: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    """All terms at once; the reduction is the attention map's."""
    short = ["optim.passes=2", "+upstream.teacher.optim.passes=1", "method.terms.output_jacobian.weight=10", "logger=none"]
    narrow = ["scale.width=0.06", "+upstream.teacher.scale.width=0.06", "trainer.threads=1"]
    done = run_py("experiment=jacobian_transfer", "scale=quick", "method=lwf_att_j", *short, *narrow)
    assert done.returncode == 0, done.stderr
    assert "finished: test/accuracy=" in done.stdout
    (file,) = (tmp_path / "results" / "runs" / "jacobian_transfer").glob("*.json")
    metrics = json.loads(file.read_text())["metrics"]
    first, last = metrics["train/loss/jacobian"]
    assert metrics["train/gradient_loss_reduction"] == pytest.approx(100 * (first - last) / first, abs=1e-3)
    assert len(metrics["train/loss/output_jacobian"]) == 2


def test_the_reduction_of_the_loss_of_output_gradients_is_recorded() -> None:
    module: Any = SimpleNamespace(curves={"train/loss": [9.0, 1.0], "train/loss/output_jacobian": [2.0, 3.0, 1.5]})
    assert Transfer.summary(module) == {"train/gradient_loss_reduction": 25.0}
    module.curves.pop("train/loss/output_jacobian")
    assert Transfer.summary(module) == {}


def test_maps_that_cannot_be_matched_are_errors_before_the_teacher_is_trained(tmp_path: Path, places: list[str]) -> None:
    config = compose_run(
        ["experiment=jacobian_transfer", "scale=quick", "method=lwf_j", "method.terms.jacobian.window=20", *places]
    )
    with pytest.raises(UserError, match="window"):
        ensure(Run(config, Paths.of(config)))
    assert not list(tmp_path.rglob("*.ckpt")) + list(tmp_path.rglob("*.json"))


def photograph(file: Path, seed: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(coarse).resize((320, 240), Image.Resampling.BICUBIC).save(file, format="JPEG")


def photographs(root: Path) -> None:
    """MIT Scenes in its published layout, 67 classes of two images; ImageNet's, three classes; weights of ResNet-34."""
    lists: dict[str, list[str]] = {"TrainImages.txt": [], "TestImages.txt": []}
    for kind in range(67):
        for number, names in enumerate(lists.values()):
            names.append(f"kind_{kind:02}/image{number}.jpg")
            photograph(root / "mit_scenes" / "Images" / names[-1], 2 * kind + number)
    for file, names in lists.items():
        (root / "mit_scenes" / file).write_text("\n".join(names))
    for number in range(12):
        split, kind = ("train", "val")[number % 2], f"n0144000{number % 3}"
        photograph(root / "imagenet" / split / kind / f"{kind}_{number}.JPEG", 200 + number)
    (root / "weights").mkdir()
    torch.save(torchvision.models.resnet34(weights=None).state_dict(), root / "weights" / "mine.pth")
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), root / "weights" / "other.pth")


def test_imagenet_to_mit_scenes_from_end_to_end(tmp_path: Path, places: list[str]) -> None:
    """The runs of scale=paper on generated folders: 224 pixels, 67 classes, a weights file; a narrow student, three steps."""
    photographs(tmp_path)
    common = ["experiment=jacobian_transfer", "scale=paper", f"paths.data={tmp_path}", *places, "logger=none"]
    short = ["trainer.threads=1", "scale.width=0.05", "optim.passes=null", "optim.steps=3", "data.per_class=1"]

    def made(*words: str) -> dict[str, Any]:
        config = compose_run([*common, *short, *words])
        return ensure(Run(config, Paths.of(config)))

    with pytest.raises(UserError, match=r"other\.pth is of another architecture: layer1\.2\.conv1\.weight is missing"):
        made("method=lwf", "+upstream.teacher.task.file=other.pth")
    with pytest.raises(UserError, match=r"data\.per_class=2: class 0 has 1 training images; ask for at most 1"):
        made("method=transfer_ce", "data.per_class=2")
    record = made("method=lwf_att_j", "+upstream.teacher.task.file=mine.pth")
    assert (record["data"]["train_images"], record["data"]["test_images"], record["steps"]) == (67, 67, 3)
    assert record["status"] == "finished"
    assert record["metrics"].keys() >= {
        "test/accuracy",
        "train/loss/jacobian",
        "train/loss/attention",
        "train/loss/activations",
    }
    start = {"data.classes": 3, "scale.width": 0.05, "optim.passes": 1, "optim.batch_size": 6}
    words = [f"++upstream.start.{key}={value}" for key, value in start.items()]
    oracle = made("method=oracle", "model.source_classes=3", *words)
    assert oracle["upstream"].keys() == {"start"}
    assert oracle["config"]["upstream"]["start"]["optim"]["optimizer"]["momentum"] == 0.9  # of conf/optim/imagenet_paper.yaml
    assert 0 <= oracle["metrics"]["test/accuracy"] <= 100


def test_missing_weights_are_an_error_that_names_the_file(
    tmp_path: Path, places: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    config = compose_run(["experiment=pretrained", f"paths.data={tmp_path}", *places])
    run = Run(config, Paths.of(config))
    with pytest.raises(UserError, match=r"weights/resnet34-b627a593\.pth is missing.*no network.*Place torchvision's"):
        ensure(run)
    (tmp_path / "weights" / "resnet34-b627a593.pth").write_bytes(b"half of it")
    with pytest.raises(UserError, match=r"resnet34-b627a593\.pth is damaged"):
        ensure(run)
