"""Data sets of image files: what is decoded, what is checked, what is refused."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_pictures import DAMAGES, damage

from gradexp.base.errors import UserError
from gradexp.data import folder
from gradexp.data.folder import window
from gradexp.data.imagenet import ImageNet
from gradexp.data.mit_scenes import MITScenes
from gradexp.engine.build import build

PHOTOGRAPHS = {
    "channels": 3,
    "size": 32,
    "only_classes": None,
    "per_class": None,
    "flip": True,
    "crop": 4,
    "normalise": "standard",
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.3, 0.4],
    "validation": None,
    "skip_corrupt": False,
    "seed": 0,
}


def photograph(file: Path, width: int = 60, height: int = 48) -> Path:
    """A smooth picture, so that JPEG keeps it."""
    coarse = np.random.default_rng(len(str(file)) + ord(file.stem[-1])).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(file, quality=95)
    return file


def scenes(root: Path, *, classes: int = 3, skip: bool = False, **changes: Any) -> MITScenes:
    options = {**PHOTOGRAPHS, **changes}
    return MITScenes(**{**options, "skip_corrupt": skip}, name="mit_scenes", classes=classes, root=root, cache=root / "cache")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three classes, four training images and two test images each."""
    home = tmp_path / "mit_scenes"
    for split, file, numbers in (("train", "TrainImages.txt", range(4)), ("test", "TestImages.txt", range(4, 6))):
        names = [f"{kind}/{kind}_{number}.jpg" for kind in ("bar", "attic", "casino") for number in numbers]
        for name in names:
            photograph(home / "Images" / name, width=50 + 7 * len(split))
        (home / file).write_text("\r\n".join(names) + "\n")
    return tmp_path


def test_statistics_are_those_of_the_channels(root: Path) -> None:
    with pytest.raises(UserError, match=r"data\.mean has 1 numbers; the images have 3 channels"):
        scenes(root, mean=[0.1])


def resized_and_cut(file: Path, resize: int, size: int) -> np.ndarray:
    """The ordinary way: the whole image resized, then a window in its middle."""
    with Image.open(file) as picture:
        image = picture.convert("RGB")
    short = min(image.size)
    image = image.resize((int(resize * image.width / short), int(resize * image.height / short)), Image.Resampling.BILINEAR)
    left, top = round((image.width - size) / 2), round((image.height - size) / 2)
    return np.asarray(image)[top : top + size, left : left + size]


@pytest.mark.parametrize(("width", "height"), [(60, 48), (48, 60), (41, 97), (40, 40)])
def test_a_window_is_cut_from_the_resized_image(tmp_path: Path, width: int, height: int) -> None:
    file = photograph(tmp_path / "a.jpg", width, height)
    expected = resized_and_cut(file, 40, 32).astype(int)
    found = window(file, size=32, resize=40, place=(0.5, 0.5), mirrored=False)
    assert np.abs(found - expected).mean() < 0.2  # rounding; one row or column off would be ten times as much
    assert np.array_equal(window(file, size=32, resize=40, place=(0.5, 0.5), mirrored=True), found[:, ::-1])


def test_windows_reach_the_corners(tmp_path: Path) -> None:
    file = photograph(tmp_path / "a.jpg", 60, 40)
    whole = resized_and_cut(file, 40, 40).astype(int)
    assert whole.shape == (40, 40, 3)
    with Image.open(file) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    for row, top in ((0.0, 0), (1.0, 8)):
        for column, left in ((0.0, 0), (1.0, 28)):
            found = window(file, size=32, resize=40, place=(row, column), mirrored=False)
            assert np.abs(found - pixels[top : top + 32, left : left + 32]).max() <= 1


def test_a_large_jpeg_is_decoded_small_and_looks_the_same(tmp_path: Path) -> None:
    file = photograph(tmp_path / "a.jpg", 500, 400)
    found = window(file, size=32, resize=40, place=(0.5, 0.5), mirrored=False)
    assert np.abs(found - resized_and_cut(file, 40, 32).astype(int)).mean() < 2


def test_batches_are_the_files_in_order_whatever_the_threads(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = scenes(root, per_class=3)
    shown = []
    for threads, ahead in ((1, 0), (4, 64)):
        monkeypatch.setattr(folder, "THREADS", threads)
        monkeypatch.setattr(folder, "AHEAD", ahead)
        loader = data.train_loader(batch_size=4, device="cpu")
        shown.append([batch for epoch in range(2) for batch in loader.batches(epoch)])
    assert [len(batch.labels) for batch in shown[0]] == [5, 4, 5, 4] or [len(b.labels) for b in shown[0]] == [4, 5, 4, 5]
    for one, other in zip(*shown, strict=True):
        assert one.share is other.share is None
        assert all(torch.equal(a, b) for a, b in zip(one[:4], other[:4], strict=True))
    loader = data.train_loader(batch_size=4, device="cpu")
    late = list(loader.batches(1, start=1))
    assert torch.equal(late[0].images, shown[0][3].images)
    again = loader.batch(late[0].row, late[0].view)
    assert torch.equal(again.images, late[0].images)


def test_test_images_are_middles_normalised(root: Path) -> None:
    data = scenes(root)
    (batch,) = data.test_loader(batch_size=6, device="cpu")
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    first, *_ = names = data.splits()["test"].names
    assert batch.labels.tolist() == [["attic", "bar", "casino"].index(name.partition("/")[0]) for name in names]
    expected = resized_and_cut(root / "mit_scenes" / "Images" / first, 40, 32)
    pixels = (batch.images[0] * torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1) + torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) * 255
    assert (pixels.permute(1, 2, 0) - torch.tensor(expected)).abs().max() <= 2.01


def test_a_loader_that_is_left_early_stops_its_threads(root: Path) -> None:
    stream = scenes(root).train_loader(batch_size=2, device="cpu").batches(0)
    next(stream)
    stream.close()  # type: ignore[attr-defined]


def test_fingerprints_are_of_contents(root: Path) -> None:
    data = scenes(root, per_class=2)
    data.train_loader(batch_size=2, device="cpu")
    facts = data.fingerprint()
    assert (facts["train_images"], facts["test_images"]) == (6, 6)
    assert facts["train"] == scenes(root)._kept("train").fingerprint
    photograph(root / "mit_scenes" / "Images" / "bar" / "bar_0.jpg", 70, 50)
    assert scenes(root)._kept("train").fingerprint != facts["train"]


def test_classes_can_be_left_out(root: Path) -> None:
    data = scenes(root, classes=2, only_classes=[2, 0])
    files = data._kept("train")
    assert files.names[0].startswith("attic/")
    assert sorted(set(files.labels.tolist())) == [0, 1]
    assert files.labels[0] == 1


def spoil(root: Path, *names: str) -> None:
    for name in names:
        file = root / "mit_scenes" / "Images" / name
        file.write_bytes(file.read_bytes()[:-300])


def test_corrupt_files_are_named_and_counted(root: Path) -> None:
    spoil(root, "bar/bar_1.jpg", "attic/attic_0.jpg")
    with pytest.raises(UserError) as caught:
        scenes(root).train_loader(batch_size=2, device="cpu")
    for part in ("2 of 12", "bar_1.jpg", "attic_0.jpg", "truncated", "data.skip_corrupt=true"):
        assert part in str(caught.value)
    data = scenes(root, skip=True)
    loader = data.train_loader(batch_size=2, device="cpu")
    assert loader.count == 10
    assert data.fingerprint()["corrupt_images"] == 2
    with pytest.raises(UserError, match="per_class=4"):
        scenes(root, skip=True, per_class=4).train_loader(batch_size=2, device="cpu")


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_of_any_kind_is_named_and_left_out(root: Path, kind: str) -> None:
    damage(root / "mit_scenes" / "Images" / "bar" / "bar_1.jpg", kind)
    with pytest.raises(UserError, match=r"1 of 12 images can't be decoded:\n.*bar_1\.jpg \(.+\)"):
        scenes(root).train_loader(batch_size=2, device="cpu")
    assert scenes(root, skip=True).train_loader(batch_size=2, device="cpu").count == 11


def test_a_file_that_is_damaged_later_is_named(root: Path) -> None:
    for kind in ("chunk type", "words"):
        loader = scenes(root, skip=True).train_loader(batch_size=2, device="cpu")
        damage(root / "mit_scenes" / "Images" / "bar" / "bar_1.jpg", kind)
        with pytest.raises(UserError, match=r"bar_1\.jpg can't be read any more"):
            list(loader)
        photograph(root / "mit_scenes" / "Images" / "bar" / "bar_1.jpg")


@pytest.mark.parametrize("damage", ["a flipped bit", "cut off", "empty", "no UTF-8"])
def test_a_damaged_note_of_the_check_is_made_again(root: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    first = scenes(root).fingerprint()
    (note,) = (root / "cache" / "data").glob("mit_scenes-test-*.json")
    content = note.read_bytes()
    damaged = {
        "a flipped bit": content[:-20] + bytes([content[-20] ^ 1]) + content[-19:],
        "cut off": content[:-20],
        "empty": b"",
        "no UTF-8": b"\xff" + content,
    }
    note.write_bytes(damaged[damage])
    assert scenes(root).fingerprint() == first
    assert note.read_bytes() == content
    assert capsys.readouterr().out.count("checking") == 2


def test_contents_that_change_behind_the_same_time_are_noticed(root: Path) -> None:
    file = root / "mit_scenes" / "Images" / "bar" / "bar_4.jpg"
    first, stat, content = scenes(root).fingerprint(), file.stat(), bytearray(file.read_bytes())
    content[-30] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert scenes(root, skip=True).fingerprint() != first


def test_a_file_that_vanishes_later_is_named(root: Path) -> None:
    loader = scenes(root).train_loader(batch_size=2, device="cpu")
    (root / "mit_scenes" / "Images" / "bar" / "bar_1.jpg").unlink()
    with pytest.raises(UserError, match=r"bar_1\.jpg can't be read any more"):
        list(loader)


def test_scenes_that_are_incomplete(root: Path) -> None:
    home = root / "mit_scenes"
    with pytest.raises(UserError, match="name 3 classes, not 67"):
        scenes(root, classes=67).fingerprint()
    lines = (home / "TrainImages.txt").read_text().splitlines()
    (home / "TrainImages.txt").write_text("\n".join(line for line in lines if "bar" not in line))
    with pytest.raises(UserError, match="lists no image of bar"):
        scenes(root).train_loader(batch_size=2, device="cpu")
    (home / "Images" / "casino" / "casino_4.jpg").unlink()
    with pytest.raises(UserError, match=r"1 of 6 listed images are missing, such as casino/casino_4\.jpg"):
        scenes(root).fingerprint()
    with pytest.raises(UserError, match=r"fetch_data\.py mit_scenes"):
        scenes(root / "nowhere").fingerprint()


def test_a_validation_split_is_held_out_of_the_training_images(root: Path) -> None:
    data = scenes(root, validation=0.25)
    trained, held_out = data._training[1], data._testing[1]
    assert (len(trained), len(held_out)) == (9, 3)
    assert not set(trained) & set(held_out)
    assert data.test_loader(batch_size=3, device="cpu").count == 3
    assert list(data._opened) == ["train"]  # the test images are not looked at


def imagenet(root: Path, classes: int, **changes: Any) -> ImageNet:
    return ImageNet(**{**PHOTOGRAPHS, **changes}, name="imagenet", classes=classes, root=root, cache=root / "cache")


def test_imagenet_is_a_folder_a_class(tmp_path: Path) -> None:
    for kind, split, suffix in (
        ("n01", "train", "JPEG"),
        ("n02", "train", "jpg"),
        ("n01", "val", "png"),
        ("n02", "val", "JPEG"),
    ):
        for number in range(2):
            photograph(tmp_path / "imagenet" / split / kind / f"{number}.{suffix}")
    data = imagenet(tmp_path, 2)
    (batch,) = data.test_loader(batch_size=4, device="cpu")
    assert [f"n0{label + 1}" for label in batch.labels] == [name[:3] for name in data.splits()["test"].names]
    assert "train" not in data.fingerprint()  # never opened
    (batch,) = imagenet(tmp_path, 1, only_classes=[1]).test_loader(batch_size=4, device="cpu")
    assert batch.labels.tolist() == [0, 0]
    with pytest.raises(UserError, match="2 classes, not 1000"):
        imagenet(tmp_path, 1000).fingerprint()
    for file in (tmp_path / "imagenet" / "val" / "n02").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="n02 holds no image"):
        imagenet(tmp_path, 2).fingerprint()
    (tmp_path / "imagenet" / "val" / "n02").rmdir()
    with pytest.raises(UserError, match="it lacks n02"):
        imagenet(tmp_path, 2).fingerprint()
    with pytest.raises(UserError, match="never downloaded"):
        imagenet(tmp_path / "nowhere", 2).fingerprint()


def test_a_misspelt_key_names_the_nearest_one(root: Path) -> None:
    """Of the class and of those that it hands its options on to; a key that is left out is named too."""
    node = {**PHOTOGRAPHS, "_target_": "gradexp.data.mit_scenes.MITScenes", "name": "mit_scenes", "classes": 3}
    extra = {"root": root, "cache": root / "cache"}
    del node["seed"]
    for wrong, right in (("skip_corupt", "skip_corrupt"), ("per_klass", "per_class")):
        with pytest.raises(UserError, match=f"data.{wrong}: MITScenes takes no such key, did you mean {right}"):
            build({**node, wrong: 1}, where="data", seed=0, **extra)
    with pytest.raises(UserError, match=r"data\.seed is missing: MITScenes needs it"):
        build(node, where="data", **extra)
    heads = {"_target_": "gradexp.models.vgg.TwoHeadedVGG", "name": "vgg", "layers": [4], "channels": 3, "classes": 2}
    with pytest.raises(UserError, match=r"model\.widht: TwoHeadedVGG takes no such key, did you mean width"):
        build({**heads, "source_classes": 3, "widht": 1, "dropout": None}, where="model")
    assert build(node, where="data", seed=0, **extra).fingerprint()["test_images"] == 6


def test_the_first_files_are_of_all_classes(tmp_path: Path) -> None:
    """As the first images of a figure are, and the first thousand that a score is a mean over."""
    for number in range(100):
        photograph(tmp_path / "imagenet" / "val" / f"n{number // 5:02}" / f"{number}.JPEG")
    labels = imagenet(tmp_path, classes=20).splits()["test"].labels
    assert len(set(labels[:20].tolist())) > 8
