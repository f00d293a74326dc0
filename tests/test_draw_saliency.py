"""Figures of Chapter 3 from sample records; the command that explains a picture."""

import io
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from commands import run_python
from fakes import fake_run
from PIL import Image
from torch import nn

from gradexp.base.errors import UserError
from gradexp.base.files import sha256
from gradexp.engine.compose import plan
from gradexp.engine.record import write_record
from gradexp.models import published
from gradexp.report import figures, specs
from gradexp.report.draw import explanation, lines, pictures
from gradexp.saliency import __main__ as explain

pytestmark = pytest.mark.usefixtures("sample_records")

SPEC: dict[str, Any] = {"number": "9.9", "xlabel": "x", "ylabel": "y", "thesis": "fig 3.2b", "first": 1, "rows": 2}

SCALES = ("paper", "cpu", "quick")


def one(folder: Path, spec: dict[str, Any], *records: dict[str, Any]) -> figures.Series:
    sources = []
    for i, record in enumerate(records):
        name = f"{spec['label']}-{spec.get('x', '')}-{i}"
        sources.append(fake_run(name, folder / f"{name}.json"))
        arrays = record.pop("arrays", None)
        if arrays:
            np.savez(folder / f"{name}.npz", **arrays)
            record["arrays"] = {"sha256": sha256(folder / f"{name}.npz")}
        write_record(sources[-1].record_path, {"id": name, **record})
    return figures.Series(spec, tuple(sources))


def test_retrained_accuracies_are_means_over_seeds_beside_the_thesis(tmp_path: Path) -> None:
    series = [one(tmp_path, {"label": "untouched", "x": 0}, {"metrics": {"test/accuracy": 60.0}})]
    for x, values in ((10, (50.0, 54.0)), (50, (30.0, 30.0))):
        records = [{"metrics": {"test/accuracy": value}} for value in values]
        series.append(one(tmp_path, {"label": "FullGrad", "x": x}, *records))
    figure, rows = lines.retrained_accuracy(SPEC, series)
    assert [(row["series"], row["x"], row["mean"], row["n"], row["thesis"]) for row in rows] == [
        ("untouched", "0", "60", 1, ""),
        ("FullGrad", "10", "52", 2, 57.2),
        ("FullGrad", "50", "30", 2, 37.4),
    ]
    assert float(rows[1]["std"]) == pytest.approx(8**0.5, abs=0.01)
    curve = next(line for line in figure.axes[0].lines if line.get_label() == "FullGrad")
    assert list(curve.get_xdata()) == [0, 10, 50]  # every curve begins where nothing is removed


def test_output_changes_are_in_order_of_the_fraction_with_standard_errors(tmp_path: Path) -> None:
    metrics = {"test/output_change@removed=0.1": 0.4, "test/output_change@removed=0.025": 0.2, "test/completeness_error": 0.0}
    metrics |= {
        "test/mean/output_change@removed=0.1": 0.3,
        "test/output_change_area": 0.25,
        "test/mean/output_change_area": 0.2,
    }
    metrics |= {f"{name}/std": 0.1 for name in metrics if "change" in name}
    series = [one(tmp_path, {"label": "Random"}, {"metrics": metrics, "images": 400})]
    figure, rows = lines.output_change(SPEC, series)
    assert [(row["x"], row["mean"], row["std"], row["error"], row["n"]) for row in rows] == [
        ("2.5", "0.2", "0.1", "0.005", 400),
        ("10", "0.4", "0.1", "0.005", 400),
        ("area", "0.25", "0.1", "0.005", 400),
    ]
    assert figure.axes[0].get_legend_handles_labels()[1] == ["Random: 0.250 ± 0.010"]  # 1.96 standard errors
    (band,) = figure.axes[0].collections
    assert band.get_paths()[0].vertices[:, 1].max() == pytest.approx(0.405)  # type: ignore[index,call-overload]
    assert figure.axes[0].get_ylim()[1] > 0.405  # nothing is cut off
    _, rows = lines.output_change({**SPEC, "reading": "mean"}, series)
    assert [(row["x"], row["mean"]) for row in rows] == [("10", "0.3"), ("area", "0.2")]


def test_every_method_has_a_look_of_its_own() -> None:
    """Also in grey: no two methods of a figure have marker and dashes in common, and a variant has its method's colour."""
    for number in ("3.2a", "3.2a-mean", "3.2a-imputed", "3.2a-most", "3.2b", "3-randomisation"):
        labels = [series["label"] for series in specs.load("figure", number)["series"] if series["label"] != lines.BASELINE]
        looks = [lines.style(label) for label in labels]
        assert len({look["marker"] for look in looks}) == len(labels)
    for label in lines.METHODS:
        assert lines.style(label)["color"] == lines.style(label.partition(",")[0])["color"]
    assert lines.style("Random")["zorder"] < lines.style("SmoothGrad")["zorder"] < lines.style("FullGrad")["zorder"]
    own = lines.style("a method of one's own")
    assert own == lines.style("a method of one's own") and own["color"] not in {colour for colour, *_ in lines.METHODS.values()}


def test_randomisation_is_drawn_over_the_number_of_random_layers(tmp_path: Path) -> None:
    metrics = {"randomised": [0, 1, 2], "correlation": [1.0, 0.5, 0.1], "correlation/std": [0.0, 0.2, 0.4]}
    record = {"metrics": metrics, "images": 100, "layers": ["untouched", "linear", "conv and norm"]}
    figure, rows = lines.randomisation(SPEC, [one(tmp_path, {"label": "FullGrad"}, record)])
    assert [(row["x"], row["layer"], row["mean"]) for row in rows] == [
        ("0", "untouched", "1"),
        ("1", "linear", "0.5"),
        ("2", "conv and norm", "0.1"),
    ]
    band = figure.axes[0].collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(0.1 - 0.04)  # type: ignore[index,call-overload]


def arrays_of(seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    maps = {name: generator.normal(size=(4, 8, 8)).astype(np.float16) for name in ("maps", "layer/input", "layer/a", "layer/b")}
    return {"images": generator.integers(0, 256, (4, 3, 8, 8), dtype=np.uint8), **maps}


def test_a_gallery_shows_the_images_that_its_spec_chooses(tmp_path: Path) -> None:
    record: dict[str, Any] = {
        "metrics": {},
        "labels": [5, 6, 7, 8],
        "names": ["a", "b", "sea, seaside", "d"],
        "layers": ["input", "a", "b"],
    }
    series = [one(tmp_path, {"label": name, "overlay": name == "b"}, {**record, "arrays": arrays_of()}) for name in ("a", "b")]
    figure, rows = pictures.gallery(SPEC, series)
    assert [(row["image"], row["column"], row["label"]) for row in rows] == [(1, "a", 6), (1, "b", 6), (2, "a", 7), (2, "b", 7)]
    assert len(figure.axes) == 6
    assert [row["name"] for row in rows] == ["b", "b", "sea, seaside", "sea, seaside"]
    assert [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()] == ["b", "sea"]  # beside the images
    other = one(tmp_path, {"label": "c"}, {**record, "arrays": arrays_of(1)})
    with pytest.raises(UserError, match="different images"):
        pictures.gallery(SPEC, [series[0], other])
    figure, rows = pictures.layers({**SPEC, "columns": 5}, series[:1])
    assert [row["column"] for row in rows[:4]] == ["input", "a", "b", "sum"]
    assert len(figure.axes) == 4 * 5


def test_an_overlay_is_the_image_in_grey_where_the_map_is_zero() -> None:
    image = np.full((3, 2, 2), 255, dtype=np.uint8)
    blended = pictures.blended(np.array([[0.0, 1.0], [0.0, 0.0]]), image)
    np.testing.assert_allclose(blended[0, 0], 0.95)
    assert blended[0, 1, 0] > blended[0, 1, 2]  # red where the map is large


def test_points_are_runs_of_every_series_and_only_at_their_scales() -> None:
    spec = specs.load("figure", "3.2b")
    found = list(specs.cells(spec, "cpu"))
    assert len(found) == 1 + 8 * 3
    assert len(list(specs.cells(spec, "paper"))) == 1 + 8 * 5
    assert found[0].commands[0] == ["experiment=roar", "scale=cpu", "data.removal=null", "seed=0"]
    assert specs.parts("figure", "3.2") == ["3.2a", "3.2b"]
    assert specs.parts("figure", "3.1") == ["3.1"]


def test_a_series_may_be_of_some_scales_only() -> None:
    """At paper the last map is larger than 4x4, and the two series of Grad-CAM would be one."""
    shown = {scale: [series["label"] for series, *_ in specs.cells(specs.load("figure", "3.2a"), scale)] for scale in SCALES}
    assert [name for name in shown["cpu"] if name not in shown["paper"]] == ["Grad-CAM, 4x4"]
    assert shown["cpu"] == shown["quick"]


@pytest.mark.parametrize("scale", SCALES)
def test_the_galleries_have_as_many_images_as_figure_3_4_shows(scale: str) -> None:
    spec = specs.load("figure", "3.4")
    for *_, seeds in specs.cells(spec, scale):
        (words,) = seeds.values()
        assert plan(words).config["evaluate"]["images"] >= spec["first"] + spec["rows"]


# --- python -m gradexp.saliency ---------------------------------------------------------------------------

PHOTO = np.random.default_rng(0).integers(0, 256, (500, 520, 3), dtype=np.uint8)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.fromarray(PHOTO).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of torch hub's checkpoints with the file of SqueezeNet, and no network."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr("torch.hub.urlopen", refused)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(torchvision.models.squeezenet1_1().state_dict(), folder / "squeezenet1_1-b8a52dc0.pth")
    return folder


def refused(*_: object, **__: object) -> None:
    raise OSError("no network")


def failure(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message with which the command ends."""
    with pytest.raises(SystemExit) as ended:
        explain.main(words)
    return ended.value.code if isinstance(ended.value.code, str) else capsys.readouterr().err.strip()


def test_published_weights_explain_a_photograph_at_its_own_size(
    photo: Path, hub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", "torchvision:squeezenet1_1", "--method", "fullgrad,input_gradient,fullgrad_signed"]
    explain.main([*words, str(photo), "--target", "Tench"])
    said = capsys.readouterr().out
    assert "class 0 (tench), probability" in said
    assert said.count("completeness error") == 2
    assert "has no spatial location" in said
    drawn = np.asarray(Image.open(photo.with_name("photo_fullgrad_input_gradient_fullgrad_signed.png")).convert("RGB"))
    left, top = 25, drawn.shape[0] - 25 - 2 * 500 - 2 * 25  # margins are a line of 25 pixels
    assert drawn.shape[1] == 4 * (520 + 25) + 25
    np.testing.assert_array_equal(drawn[top : top + 500, left : left + 520], PHOTO)


def test_the_map_is_over_what_the_network_gets() -> None:
    """Of a wide picture, the middle square; a transform that crops 224 of 256 pixels sees seven eighths of it."""
    torch.manual_seed(0)
    classifier = published.torchvision_classifier("squeezenet1_1", weights="random")
    marked = Image.new("RGB", (512, 256))
    left, top, right, bottom = classifier.region(marked.size)
    assert (left, top, right, bottom) == (144, 16, 368, 240)
    marked.paste((255, 255, 255), (int(left), int(top), int(right), int(bottom)))
    assert float(classifier.prepare(marked).std(dim=(2, 3)).max()) < 1e-3  # nothing but the region is seen
    pixels = np.asarray(marked)
    over = explanation.laid_over(np.eye(2), pixels, (left, top, right, bottom))
    outside = np.ones(pixels.shape[:2], dtype=bool)
    outside[16:240, 144:368] = False
    np.testing.assert_allclose(over[outside], 0.6, rtol=1e-6)  # black, drawn pale
    assert over[20, 150, 0] > over[20, 150, 2] + 0.2  # the map is large at the upper left, and red


def test_classes_are_numbers_or_names() -> None:
    classifier = published.torchvision_classifier("squeezenet1_1", weights="random")
    classifier = replace(classifier, classes=["crane", "heron", "Crane", "grey owl"])
    assert [explain.label_of(word, classifier) for word in (None, "2", "HERON")] == [None, 2, 1]
    for word, message in (("crane", "classes 0 and 2 have"), ("owl", "did you mean grey owl"), ("herno", "did you mean heron")):
        with pytest.raises(UserError, match=message):
            explain.label_of(word, classifier)


def test_weights_of_a_file_may_have_another_number_of_classes(
    photo: Path, hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(torchvision.models.squeezenet1_1(num_classes=5).state_dict(), tmp_path / "mine.pth")
    words = [str(photo), "--model", "torchvision:squeezenet1_1", "--size", "96", "--weights"]
    explain.main([*words, str(tmp_path / "mine.pth"), "--method", "input_gradient", "--out", str(tmp_path / "new" / "map.pdf")])
    assert (tmp_path / "new" / "map.pdf").read_bytes().startswith(b"%PDF")
    assert "tench" not in capsys.readouterr().out  # ImageNet's names are not those of five other classes
    assert "class 7" in failure([*words, str(tmp_path / "mine.pth"), "--target", "7"], capsys).replace("target=", "class ")
    assert "no such file" in failure([*words, "mime.pth"], capsys)
    explain.main([*words, "random", "--method", "input_gradient"])


def test_weights_of_a_checkpoint_or_of_data_parallel_are_found(photo: Path, hub: Path, tmp_path: Path) -> None:
    state = torchvision.models.squeezenet1_1(num_classes=5).state_dict()
    torch.save({"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "mine.pth")
    words = [str(photo), "--model", "torchvision:squeezenet1_1", "--size", "96", "--method", "input_gradient"]
    explain.main([*words, "--weights", str(tmp_path / "mine.pth")])


@pytest.mark.parametrize("content", [{"epoch": 3}, nn.Linear(2, 3), [1, 2], "text"], ids=["dict", "model", "list", "text"])
def test_files_without_a_state_dict_say_what_to_save(
    content: Any, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(content, tmp_path / "mine.pth")
    message = failure([str(photo), "--model", "torchvision:squeezenet1_1", "--weights", str(tmp_path / "mine.pth")], capsys)
    assert message.strip().endswith("holds no state dict, or is damaged: save model.state_dict() there, or download it again")


def test_pictures_of_an_earlier_command_are_left_out(hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`*.png`, typed twice."""
    Image.fromarray(PHOTO).save(tmp_path / "one.png")
    words = ["--model", "torchvision:squeezenet1_1", "--weights", "random", "--size", "96", "--method", "input_gradient"]
    for _ in range(2):
        explain.main([*sorted(map(str, tmp_path.glob("*.png"))), *words])
    assert sorted(file.name for file in tmp_path.glob("*.png")) == ["one.png", "one_input_gradient.png"]
    assert "one_input_gradient.png is left out" in capsys.readouterr().out


def test_names_as_long_as_a_disk_takes_are_written_and_longer_ones_told(
    hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", "torchvision:squeezenet1_1", "--weights", "random", "--size", "96", "--method", "input_gradient"]
    for length, fits in ((255 - len("_input_gradient.png"), True), (251, False)):
        Image.fromarray(PHOTO).save(picture := tmp_path / f"{'n' * length}.jpg")
        if fits:
            explain.main([str(picture), *words])
            assert (tmp_path / f"{picture.stem}_input_gradient.png").exists()
        else:
            assert "the name is too long; give a shorter one: --out" in failure([str(picture), *words], capsys)


def test_a_name_may_begin_with_a_hyphen(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(PHOTO).save("-m.png")
    explain.main(["--model", "torchvision:squeezenet1_1", "--out", "map.png", "--method", "input_gradient", "--", "-m.png"])
    assert Path("map.png").exists()


def test_panels_have_room_for_words_and_titles_are_no_formulas() -> None:
    """A picture of 8 x 600 pixels: columns of 14 lines of text, of 14 pixels, to the width."""
    maps = {"fullgrad": np.eye(2), "smoothgrad": np.eye(2)}
    content = explanation.explanation(Image.new("RGB", (8, 600)), (0, 296, 8, 304), maps, "a$b_{c$", ["1 (tench): 3.0%"])
    assert Image.open(io.BytesIO(content)).width == 3 * (14 * 14 + 14) + 14
    content = explanation.explanation(Image.new("RGB", (600, 8)), (296, 0, 304, 8), maps, "title", ["one", "two", "three"])
    assert Image.open(io.BytesIO(content)).height == 2 * (int(1.5 * 14 * 3) + 2 * 14) + 3 * 14


def test_missing_weights_name_the_file_to_place(photo: Path, hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = failure([str(photo), "--model", "torchvision:alexnet"], capsys)
    assert f"Place {hub / 'alexnet-owt-7be5be79.pth'}, from https://" in message
    assert "no network" in message
    assert "--weights random" in message
    (hub / "alexnet-owt-7be5be79.pth").write_bytes(b"half a file")
    assert "no readable weights file" in failure([str(photo), "--model", "torchvision:alexnet"], capsys)
    assert "did you mean alexnet?" in failure([str(photo), "--model", "torchvision:alexnt"], capsys)


def test_one_bad_picture_does_not_stop_the_others(
    photo: Path, hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    words = ["--model", "torchvision:squeezenet1_1", "--method", "input_gradient", "--out", str(tmp_path / "maps")]
    with pytest.raises(SystemExit) as ended:
        explain.main([str(tmp_path / "bad.jpg"), *words, "--set", "scale=quick", str(photo), "--set", "trainer.threads=1"])
    assert ended.value.code == 1
    assert "bad.jpg can't be read" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "maps").iterdir()] == ["photo_input_gradient.png"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "PHOTO"], "is a picture to explain"),
        (["--out", "map.bmp"], "the file's name ends in"),
        (["--out", "/proc/none/"], "can't be written"),
        (["OTHER", "--out", "map.png"], "several pictures need a folder"),
        (["OTHER", "--out", "FOLDER"], "would both be explained in"),
        (["--model", "torchvison:resnet18"], "did you mean torchvision:resnet18?"),
        (["--model", "experiment:score_objective"], "train no model"),
        (["--model", "experiment:teacher", "--size", "64"], "--size is for published networks"),
        (["--set", "seed=1"], "takes overrides of saliency, trainer and scale only"),
        (["--set", "saliency.sample=3"], "saliency.sample"),
        (["--train"], "--train is for networks of experiments"),
        (["--target", "tabbi"], "did you mean tabby"),
        (["--method", "fullgrd"], "fullgrad"),
        (["--method", "fullgrad,"], "'' is no name"),
        (["--method", "../saliency/fullgrad"], "is no name"),
    ],
)
def test_mistakes_are_noticed_before_any_work(
    words: list[str], message: str, photo: Path, hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other").mkdir()
    Image.fromarray(PHOTO).save(tmp_path / "other" / "photo.jpg")
    places = {"PHOTO": photo, "OTHER": tmp_path / "other" / "photo.jpg", "FOLDER": tmp_path / "folder"}
    words = [str(places.get(word, word)) for word in words]
    before = sorted(tmp_path.rglob("*.*"))
    model = [] if "--model" in words else ["--model", "torchvision:squeezenet1_1"]
    assert message in failure([str(photo), *model, *words], capsys)
    assert sorted(tmp_path.rglob("*.*")) == before


def test_timm_is_optional(photo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "pip install timm" in failure([str(photo), "--model", "timm:resnet18"], capsys)


def test_networks_of_timm(photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    explain.main([str(photo), "--model", "timm:test_resnet", "--weights", "random", "--target", "tench"])
    assert "completeness error" in capsys.readouterr().out
    assert "did you mean" in failure([str(photo), "--model", "timm:resnet19"], capsys)


def test_weights_of_a_run_explain_a_picture_without_its_data_set(
    tmp_path: Path, photo: Path, places: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    (tmp_path / "weights").mkdir()
    torch.save(torchvision.models.vgg16_bn(weights=None).state_dict(), tmp_path / "weights" / "mine.pth")
    words = ["model=vgg16_bn_imagenet", "task.file=mine.pth", "trainer.threads=1", *places, f"paths.data={tmp_path}"]
    explain.main([str(photo), "--model", "experiment:pretrained", "--target", "5", "--set", *words])
    assert "class 5" in capsys.readouterr().out


def test_the_command_draws_a_map_of_a_trained_network(tmp_path: Path, places: list[str]) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50), dtype=np.uint8)).save(tmp_path / "photo.png")
    words = ["-m", "gradexp.saliency", str(tmp_path / "photo.png"), "--model", "experiment:teacher"]
    tiny = ["--set", "scale=quick", "logger=none", "--set", "scale.width=0.04", "optim.passes=1", "trainer.threads=1", *places]
    asked = run_python(*words, *tiny)
    assert asked.returncode == 1
    assert re.search(r"experiment:teacher is not trained yet, which takes .*; add --train", asked.stderr)
    done = run_python(*words, "--train", *tiny)
    assert done.returncode == 0, done.stderr
    assert "completeness error" in done.stdout
    assert Image.open(tmp_path / "photo_fullgrad.png").size[0] > 1000
    wrong = run_python(*words, "--target", "10", *tiny)
    assert wrong.stderr.strip() == "error: there is no class 10: the model has classes 0 to 9"
