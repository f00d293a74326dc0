"""Pictures in files: any format and depth that Pillow reads, as upright 8-bit RGB."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from gradexp.base.errors import UserError

SMALLEST = 8  # pixels on a side; below that nothing can be seen
LARGEST = tuple(2**bits - 1 for bits in (8, 10, 12, 14, 16))  # what cameras and scanners store in 16 bits

Note = Callable[[str], object]


class UnreadableError(Exception):
    """A picture that can't be decoded; the message is the reason, on one line."""


def read(path: Path, note: Note = print) -> Image.Image:
    """A picture of at least SMALLEST pixels on a side, as `decode` returns it.

    note: called with a line for each assumption. Raises UserError.
    """
    try:
        picture = decode(path, note=lambda line: note(f"{path}: {line}"))
    except UnreadableError as error:
        raise UserError(f"{path} can't be read as a picture ({error}); give a PNG or JPEG file") from None
    if min(picture.size) < SMALLEST:
        raise UserError(f"{path} is {picture.width}x{picture.height} pixels; give one of at least {SMALLEST}x{SMALLEST}")
    return picture


def decode(source: Path | BinaryIO, *, short: int | None = None, note: Note | None = None) -> Image.Image:
    """The first frame of a picture, turned upright by its EXIF orientation, as RGB; transparent parts become white.

    short: the length of the short side that is enough; a large JPEG is then decoded at a half, a quarter or an eighth of its
    size.
    note: called with a line where only the first of several frames is used, and where the range of the values is not that
    of the format (`_eight_bit`); without it, a picture of the second kind is refused. Raises UnreadableError.
    """
    try:
        with Image.open(source) as picture:
            if short:
                picture.draft("RGB", (short, short))
            if note and (frames := getattr(picture, "n_frames", 1)) > 1:
                note(f"only the first of its {frames} frames is used")
            picture.load()  # before the orientation is asked for: Pillow turns a TIFF upright while loading it
            with suppress(Exception):  # damaged EXIF data: the pixels are intact
                ImageOps.exif_transpose(picture, in_place=True)
            return _on_white(_eight_bit(picture, note))
    except UnreadableError:
        raise
    except UnidentifiedImageError:
        raise UnreadableError("it is empty or of an unknown format") from None
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
        reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
        raise UnreadableError(reason.splitlines()[0]) from None


def _eight_bit(picture: Image.Image, note: Note | None) -> Image.Image:
    """Scales deeper values to 8 bits, where Pillow would cut them off at 255.

    White is the largest value of the smallest range that holds all values: 8, 10, 12, 14 or 16 bits, or [0, 1] for
    floating point. Other values are refused.
    """
    if not picture.mode.startswith(("I", "F")):
        return picture
    values = np.asarray(picture, dtype=np.float64)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= LARGEST[-1]):
        raise UnreadableError(f"its values go from {low:g} to {high:g}; save it with 8 or 16 bits a pixel")
    ranges = (1, *LARGEST) if picture.mode == "F" else LARGEST
    white = next(value for value in ranges if high <= value)
    if white != LARGEST[-1]:
        if note is None:
            raise UnreadableError(f"its values go up to {high:g}, white is not known; save it with 8 bits a pixel")
        note(f"its values go up to {high:g}; 0 to {white} is taken as the range from black to white")
    return Image.fromarray((values / (white / 255)).round().astype(np.uint8))


def _on_white(picture: Image.Image) -> Image.Image:
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA")).convert("RGB")
