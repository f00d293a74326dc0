"""Pictures of any format, depth and orientation, and damaged ones."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from gradexp.base.errors import UserError
from gradexp.data import pictures
from gradexp.data.folder import window

CORNERS = np.kron(np.array([[0, 80], [160, 240]], dtype=np.uint8), np.ones((16, 24), dtype=np.uint8))


def corners(picture: Image.Image) -> list[int]:
    """Grey values near the four corners, row by row, in steps of 80."""
    grey = np.asarray(picture.convert("L")).astype(int)
    return [round(grey[row, column] / 80) for row in (3, -4) for column in (3, -4)]


def oriented(file: Path, orientation: int) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(CORNERS).convert("RGB").save(file, exif=exif)
    return file


# The corners of an image that is stored with each orientation, as EXIF 2.3, section 4.6.4, defines them.
UPRIGHT = {
    1: [0, 1, 2, 3],
    2: [1, 0, 3, 2],
    3: [3, 2, 1, 0],
    4: [2, 3, 0, 1],
    5: [0, 2, 1, 3],
    6: [2, 0, 3, 1],
    7: [3, 1, 2, 0],
    8: [1, 3, 0, 2],
}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_pictures_are_turned_upright(tmp_path: Path, orientation: int, suffix: str) -> None:
    file = oriented(tmp_path / f"a.{suffix}", orientation)
    picture = pictures.read(file)
    assert picture.size == ((48, 32) if orientation < 5 else (32, 48))
    assert corners(picture) == UPRIGHT[orientation]
    cut = window(file, size=32, resize=32, place=(0.5, 0.5), mirrored=False)  # of a data set of photographs
    assert corners(Image.fromarray(cut)) == UPRIGHT[orientation]


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_none(tmp_path: Path, value: int) -> None:
    assert corners(pictures.read(oriented(tmp_path / "a.jpg", value))) == UPRIGHT[1]


def test_damaged_exif_data_leaves_the_pixels(tmp_path: Path) -> None:
    for number, exif in enumerate((b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0nonsense")):
        file = tmp_path / f"{number}.jpg"
        Image.fromarray(CORNERS).save(file, exif=exif)
        assert corners(pictures.read(file)) == UPRIGHT[1]


# --- modes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB"])
def test_opaque_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    """As through RGBA, which is how transparent ones go."""
    colour = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    stored = Image.fromarray(colour, "LAB") if mode == "LAB" else Image.fromarray(colour).convert(mode)
    stored.save(tmp_path / "a.tiff")
    picture = pictures.read(tmp_path / "a.tiff")
    assert picture.mode == "RGB"
    assert np.array_equal(np.asarray(picture), np.asarray(stored.convert("RGBA"))[..., :3])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L with a transparent value", "RGB with a transparent colour"])
def test_transparent_parts_become_white(tmp_path: Path, mode: str) -> None:
    pixels = np.full((20, 30, 4), (10, 10, 10, 255), dtype=np.uint8)
    pixels[:10] = (50, 50, 50, 0)
    name, *keyed = mode.split(" with ")
    picture = Image.fromarray(pixels).convert("RGBA" if name == "P" else name)
    options = {"transparency": 50 if name == "L" else (50, 50, 50)} if keyed else {}
    (picture.quantize() if name == "P" else picture).save(tmp_path / "a.png", **options)
    found = np.asarray(pictures.read(tmp_path / "a.png"))
    assert (found[:10] == 255).all()
    assert (found[10:] == 10).all()


def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path) -> None:
    ramp = np.linspace(0, 2**16 - 1, 400).astype(np.uint16).reshape(20, 20)
    for name, values in (("a.png", ramp), ("a.tiff", ramp), ("b.tiff", ramp.astype(np.int32))):
        Image.fromarray(values).save(tmp_path / name)
        lines: list[str] = []
        found = np.asarray(pictures.read(tmp_path / name, lines.append))
        assert np.abs(found[..., 0] - ramp / 257).max() <= 0.5
        assert not lines


@pytest.mark.parametrize(
    ("kind", "largest", "white"),
    [
        ("uint16", 4000, 4095),  # a camera's 12 bits
        ("uint16", 200, 255),
        ("uint16", 16383, 16383),
        ("int32", 1000, 1023),
        ("float32", 1.0, 1),
        ("float32", 0.6, 1),
        ("float32", 250.0, 255),
    ],
)
def test_a_range_that_is_assumed_is_printed(tmp_path: Path, kind: str, largest: float, white: int) -> None:
    ramp = np.linspace(0, largest, 400).astype(kind).reshape(20, 20)
    Image.fromarray(ramp).save(tmp_path / "a.tiff")
    lines: list[str] = []
    found = np.asarray(pictures.read(tmp_path / "a.tiff", lines.append))
    assert np.abs(found[..., 0] - ramp * (255 / white)).max() <= 0.5 + 1e-3
    expected = f"its values go up to {largest:g}; 0 to {white} is taken as the range from black to white"
    assert lines == [f"{tmp_path / 'a.tiff'}: {expected}"]
    with pytest.raises(pictures.UnreadableError, match="white is not known"):  # each image of a data set would get its own
        pictures.decode(tmp_path / "a.tiff")


@pytest.mark.parametrize("values", [(-1.0, 1.0), (0.0, 1e5), (0.0, np.nan), (0.0, np.inf)])
def test_values_in_no_range_are_refused(tmp_path: Path, values: tuple[float, float]) -> None:
    Image.fromarray(np.resize(np.float32(values), (20, 20))).save(tmp_path / "a.tiff")
    with pytest.raises(UserError, match="save it with 8 or 16 bits"):
        pictures.read(tmp_path / "a.tiff")


@pytest.mark.parametrize("suffix", ["gif", "tiff", "webp", "png"])
def test_of_several_frames_the_first_is_used(tmp_path: Path, suffix: str) -> None:
    first, second = (Image.fromarray(np.full((20, 20), value, dtype=np.uint8)) for value in (0, 160))
    first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=[second])
    lines: list[str] = []
    assert np.asarray(pictures.read(tmp_path / f"a.{suffix}", lines.append)).max() < 5
    assert [line.rpartition(": ")[2] for line in lines] == ["only the first of its 2 frames is used"]
    pictures.decode(tmp_path / f"a.{suffix}")


# --- what can't be read -----------------------------------------------------------------------------------


def damage(file: Path, kind: str) -> None:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(out, "PNG")
    content = bytearray(out.getvalue())
    data = content.index(b"IDAT")
    if kind == "chunk type":  # SyntaxError
        content[data : data + 4] = b"\0\xff\0\xff"
    elif kind == "header of two bytes":  # ValueError
        content[8:33] = struct.pack(">I", 2) + b"IHDRab" + struct.pack(">I", zlib.crc32(b"IHDRab"))
    elif kind == "stream":  # zlib.error or OSError
        content[data + 10 : data + 60] = bytes(50)
    elif kind == "cut off":
        content = content[: len(content) // 2]
    elif kind == "bomb":  # DecompressionBombError
        header = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
        content[12:33] = header + struct.pack(">I", zlib.crc32(header))
    elif kind == "empty":
        content.clear()
    elif kind == "words":
        content[:] = b"no picture"
    file.write_bytes(content)


DAMAGES = ["chunk type", "header of two bytes", "stream", "cut off", "bomb", "empty", "words"]


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_one_line(tmp_path: Path, kind: str) -> None:
    damage(tmp_path / "a.png", kind)
    with pytest.raises(UserError, match=r"a\.png can't be read as a picture \(.+\); give a PNG or JPEG file") as caught:
        pictures.read(tmp_path / "a.png")
    assert "\n" not in str(caught.value)
    assert "0x" not in str(caught.value)  # no addresses of Python objects


def test_places_that_hold_no_picture_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    for name, reason in (("folder.png", "Is a directory"), ("absent.png", "No such file or directory")):
        with pytest.raises(UserError, match=rf"{name} can't be read as a picture \({reason}\)"):
            pictures.read(tmp_path / name)
    Image.fromarray(CORNERS[:1, :1]).save(tmp_path / "small.png")
    with pytest.raises(UserError, match="is 1x1 pixels; give one of at least 8x8"):
        pictures.read(tmp_path / "small.png")


def test_the_first_bytes_of_formats_that_stop_there_are_one_line(tmp_path: Path) -> None:
    for suffix in ("png", "jpg", "gif", "bmp", "tiff", "webp", "ico", "ppm", "tga", "pcx"):
        whole = tmp_path / f"whole.{suffix}"
        ImageOps.posterize(Image.fromarray(CORNERS).convert("RGB"), 2).save(whole)
        content = whole.read_bytes()
        for length in (2, 5, 9, 17, 30, 60):
            (tmp_path / "cut").write_bytes(content[:length])
            with pytest.raises(UserError, match="can't be read as a picture"):
                pictures.read(tmp_path / "cut")
