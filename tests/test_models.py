"""Architectures: exactly the parameters that their description implies."""

import pytest
import torch
from tiny import randomised

from gradexp import gradients
from gradexp.base.errors import UserError
from gradexp.engine.build import build
from gradexp.engine.compose import compose_run
from gradexp.models.vgg import VGG


def expected(layers: list[int | str], channels: int, classes: int) -> int:
    """Convolution 9 c_in c_out + c_out; batch normalisation 2 c_out; linear c_in K + K."""
    count = 0
    for out in (layer for layer in layers if isinstance(layer, int)):
        count += 9 * channels * out + out + 2 * out
        channels = out
    return count + channels * classes + classes


# The thesis's §2.12.1 for VGG-4 and 9, the author's code for VGG-6 and 11.
THESIS = {
    "vgg4": [64, "M", 128, "M", 512, "M"],
    "vgg6": [64, "M", 128, "M", 256, "M", 512, "M", 512, "M"],
    "vgg9": [64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"],
    "vgg11": [64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"],
}


@pytest.mark.parametrize("name", THESIS)
def test_parameter_counts(name: str) -> None:
    config = compose_run(["experiment=teacher", f"model={name}", "scale=paper"])
    model = build(config["model"], where="model")
    assert sum(parameter.numel() for parameter in model.parameters()) == expected(THESIS[name], 3, 100)
    weighted = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(weighted) == int(name.removeprefix("vgg"))


def test_vgg4_by_hand() -> None:
    assert expected(THESIS["vgg4"], 3, 100) == 1_920 + 74_112 + 591_360 + 51_300


def tiny(**changes: object) -> VGG:
    options = {"name": "t", "layers": [4, "M", 8], "width": 1, "channels": 3, "classes": 5, "dropout": None}
    return VGG(**{**options, **changes})  # type: ignore[arg-type]


def test_the_authors_vgg11_has_the_parameters_of_his_code() -> None:
    """Four pools and a linear layer on 2x2 pixels of 512 channels: 9,615,780 parameters on CIFAR-100."""
    config = compose_run(["experiment=score_matching", "model=vgg11_softplus", "method=ce", "scale=paper"])
    model = build(config["model"], where="model")
    convolutions = expected(THESIS["vgg11"], 3, 100) - (512 * 100 + 100)
    assert sum(parameter.numel() for parameter in model.parameters()) == convolutions + 512 * 4 * 100 + 100 == 9_615_780
    assert sum(isinstance(module, torch.nn.MaxPool2d) for module in model.modules()) == 4
    assert sum(isinstance(module, torch.nn.Softplus) for module in model.modules()) == 10
    small = compose_run(["experiment=score_matching", "model=vgg11_softplus", "method=ce", "scale=quick", "model.width=0.125"])
    assert build(small["model"], where="model").eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_the_authors_initialisation() -> None:
    """Standard deviations of each kind of parameter, within six standard errors; without it they are torch's."""

    def deviations(init: str | None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = tiny(layers=[64, "M", 256], classes=400, init=init)
        return {name: value.detach().square().mean().sqrt() for name, value in model.named_parameters()}

    ours, his = deviations(None), deviations("author")
    for name, expected_std, count in [
        ("features.conv1.weight", (2 / (9 * 64)) ** 0.5, 27 * 64),
        ("features.conv2.weight", (2 / (9 * 256)) ** 0.5, 9 * 64 * 256),
        ("features.conv2.bias", 0.1, 256),
        ("linear.weight", 0.01, 256 * 400),
        ("linear.bias", 1.0, 400),
    ]:
        assert his[name] == pytest.approx(expected_std, rel=6 / (2 * count) ** 0.5)
        assert ours[name] != pytest.approx(expected_std, rel=0.1)
    assert all(his[name] == ours[name] for name in his if "norm" in name)
    with pytest.raises(UserError, match=r"model\.init=autor: .*did you mean author"):
        tiny(init="autor")


def test_a_flattened_head_has_weights_for_each_pixel() -> None:
    """The linear layer is the flattened map's own, pixel by pixel; one whose weights repeat is the average's."""
    torch.manual_seed(0)
    pooled, flat = tiny().double().eval(), tiny(head="flatten", size=8).double().eval()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    assert flat.linear.in_features == 8 * 4 * 4
    flat.features.load_state_dict(pooled.features.state_dict())
    flat.linear.weight.data, flat.linear.bias.data = pooled.linear.weight.repeat_interleave(16, dim=1) / 16, pooled.linear.bias
    torch.testing.assert_close(flat(images), pooled(images))
    torch.nn.init.normal_(flat.linear.weight)
    by_hand = torch.einsum("bchw,kchw->bk", flat.features(images), flat.linear.weight.view(5, 8, 4, 4)) + flat.linear.bias
    torch.testing.assert_close(flat(images), by_hand)
    whole = gradients.full_gradient(randomised(flat), images, torch.tensor([0, 1]))
    assert whole.error().max() < 1e-12  # complete (Eq. 3.1)


def test_a_flattened_map_needs_the_size_of_the_images() -> None:
    with pytest.raises(UserError, match=r"set model\.size"):
        tiny(head="flatten")
    with pytest.raises(UserError, match="at least 4 pixels"):
        tiny(layers=[4, "M", "M"], head="flatten", size=3)
    with pytest.raises(UserError, match="made for images of 8 pixels, not 6"):
        tiny(head="flatten", size=8)(torch.zeros(2, 3, 6, 6))
    with pytest.raises(UserError, match="average or flatten"):
        tiny(head="pool")


@pytest.mark.parametrize("head", ["average", "flatten"])
def test_dropout_is_of_the_linear_layers_input(head: str) -> None:
    """On averaged features, one number of a mask for each image and channel; none in eval mode."""
    model, images = tiny(head=head, size=8, dropout=0.4).train(), torch.randn(6, 3, 8, 8)
    features = model.features(images)
    hidden = features.mean((2, 3)) if head == "average" else features.flatten(1)
    torch.manual_seed(3)
    found = model(images)
    torch.manual_seed(3)
    mask = torch.nn.functional.dropout(torch.ones_like(hidden), 0.4)
    torch.testing.assert_close(found, torch.nn.functional.linear(hidden * mask, model.linear.weight, model.linear.bias))
    assert 0 < (mask == 0).sum() < mask.numel()
    model.eval()
    torch.testing.assert_close(model(images), model(images), rtol=0, atol=0)


def test_width_scales_channels() -> None:
    assert [m.out_channels for m in tiny(width=0.5).modules() if isinstance(m, torch.nn.Conv2d)] == [2, 4]
    assert [m.out_channels for m in tiny(width=0.01).modules() if isinstance(m, torch.nn.Conv2d)] == [1, 1]


def test_channels_classes_and_size() -> None:
    assert tiny(channels=1)(torch.zeros(2, 1, 9, 7)).shape == (2, 5)


def test_no_relu_is_in_place() -> None:
    assert not any(module.inplace for module in tiny().modules() if isinstance(module, torch.nn.ReLU))


def test_an_image_too_small_for_the_pools_is_an_error() -> None:
    with pytest.raises(UserError, match="at least 4 pixels"):
        tiny(layers=[4, "M", "M"])(torch.zeros(2, 3, 3, 3))


def test_resnet18_has_the_parameters_of_its_description() -> None:
    """torchvision's ResNet-18, but for a 3x3 stem instead of 7x7 and another number of classes."""
    import torchvision

    config = compose_run(["experiment=teacher", "model=resnet18", "scale=paper"])
    model = build(config["model"], where="model")
    reference = torchvision.models.resnet18(num_classes=100)
    counts = [sum(parameter.numel() for parameter in network.parameters()) for network in (model, reference)]
    assert counts[0] == counts[1] - 64 * 3 * 49 + 64 * 3 * 9
    assert sum(isinstance(module, torch.nn.Softplus) for module in model.modules()) == 17


def test_resnet_stages_halve_the_image() -> None:
    config = compose_run(["experiment=teacher", "model=resnet18", "scale=quick", "scale.width=0.0625"])
    model = build(config["model"], where="model").eval()
    shapes: list[tuple[int, ...]] = []
    for stage in model.stages:
        stage.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape[1:])))
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert shapes == [(4, 32, 32), (8, 16, 16), (16, 8, 8), (32, 4, 4)]
