"""python scripts/pack_data.py cifar100 --per-class 50 --seeds 0 1 --out FOLDER: packs a subset to carry to another machine.

FOLDER/cifar100/ then has the test set and, of the training set, the images that runs with data.per_class up to 50 and these
seeds (data.subset_seed, where that is set) choose, as parquet in the layout of the Hub. With paths.data=FOLDER such a run has
the same id, images, normalisation and fingerprints as on the complete data set; one that needs other training images, such as
a teacher of all of them, is refused: carry its record and its folder of outputs. The fingerprint of the training set is the one
noted here: without the images that are left out, it can't be computed there.
"""

import argparse
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from gradexp.base.errors import UserError
from gradexp.base.files import draft_of, move_into_place
from gradexp.data import parquet, subsets
from gradexp.data.parquet import Layout
from gradexp.data.sources import Split
from gradexp.engine.assemble import declare_data
from gradexp.engine.compose import compose_run
from gradexp.engine.exits import exit_on_errors
from gradexp.engine.run import Paths


def pack(layout: Layout, splits: dict[str, Split], root: Path, per_class: int, seeds: Sequence[int]) -> Path:
    """Writes the subsets of these seeds and the test set; returns their folder. Raises UserError where one is there already."""
    folder = root / layout.name
    if list(folder.glob("*.parquet")):
        raise UserError(f"{folder} holds parquet files; name another folder with --out, or delete them")
    train = splits["train"]
    chosen = np.unique([subsets.nested(train.labels, per_class=per_class, seed=seed) for seed in seeds])
    packed = Split(train.images[train.rows(chosen)], train.labels[chosen])
    note = {
        "subset": f"{per_class} per class, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}",
        "rows": chosen.tolist(),
        "packed": packed.fingerprint,
        "labels": train.labels.tolist(),
        "fingerprint": train.fingerprint,
        "colours": [values.tolist() for values in train.colours],
    }
    write(folder / "test-00000-of-00001.parquet", layout, splits["test"], {})
    write(folder / "train-00000-of-00001.parquet", layout, packed, {parquet.PACK: json.dumps(note)})
    return folder


def write(file: Path, layout: Layout, split: Split, metadata: dict[bytes, str]) -> None:
    """Writes PNG images and labels, and what the Hub's library needs to decode them."""
    images = [{"bytes": png(image), "path": None} for image in split.images]
    names = [*layout.names] or [str(label) for label in range(layout.classes)]
    features: dict[str, Any] = {layout.image_column: {"_type": "Image"}}
    features[layout.label_column] = {"names": names, "_type": "ClassLabel"}
    described = {b"huggingface": json.dumps({"info": {"features": features}}), **metadata}
    kinds = [pa.struct({"bytes": pa.binary(), "path": pa.string()}), pa.int64()]
    columns = dict(zip((layout.image_column, layout.label_column), map(pa.array, (images, split.labels), kinds), strict=True))
    draft = draft_of(file)
    try:
        pq.write_table(pa.table(columns).replace_schema_metadata(described), draft)
        move_into_place(draft, file)
    finally:
        draft.unlink(missing_ok=True)


def png(image: np.ndarray) -> bytes:
    """image (C, H, W) uint8, of 1 or 3 channels."""
    out = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0) if len(image) == 3 else image[0]).save(out, "PNG")
    return out.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="cifar10, cifar100 or mnist")
    parser.add_argument("--per-class", type=int, required=True, metavar="K", help="training images per class, for each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="SEED")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument(
        "--set", nargs="*", action="extend", default=[], metavar="KEY=VALUE", help="of paths, such as paths.data=FOLDER"
    )
    given = parser.parse_args()
    with exit_on_errors():
        if given.per_class < 1 or min(given.seeds) < 0:
            raise UserError("--per-class is 1 or more, --seeds are 0 or more")
        config = compose_run(["experiment=teacher", f"data={given.name}", *given.set])
        data = declare_data(config, Paths.of(config))
        if not hasattr(data, "layout") or data.only_classes is not None:
            raise UserError(
                f"{given.name} can't be packed: only cifar10, cifar100 and mnist are read from parquet; photographs are read "
                f"from their files, so copy their folder (docs/data.md), and the digits come with scikit-learn"
            )
        folder = pack(data.layout, dict(data.splits()), given.out, given.per_class, given.seeds)
        size = sum(file.stat().st_size for file in folder.glob("*.parquet")) / 2**20
        print(f"written: {folder} ({size:.0f} MiB); use it with paths.data={given.out}")


if __name__ == "__main__":
    main()
