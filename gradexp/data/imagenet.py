"""ImageNet (Russakovsky et al., 2015): a folder in the layout that torchvision reads. Never downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gradexp.base.errors import UserError
from gradexp.data.folder import FolderData

FOLDERS = {"train": "train", "test": "val"}
SUFFIXES = (".jpeg", ".jpg", ".png")


class ImageNet(FolderData):
    def files(self, split: str) -> tuple[Path, list[str], list[int]]:
        home = self.root / "imagenet"
        folder = home / FOLDERS[split]
        if not folder.is_dir():
            raise UserError(
                f"ImageNet not found: there is no {folder}. Put a folder a class there (train/n01440764/*.JPEG, "
                f"val/n01440764/*.JPEG); it is never downloaded; see docs/data.md"
            )
        classes = sorted(place.name for place in folder.iterdir() if place.is_dir())
        other = home / FOLDERS["test" if split == "train" else "train"]
        missing = sorted({place.name for place in other.iterdir() if place.is_dir()} - set(classes)) if other.is_dir() else []
        if missing or not self.complete(len(classes)):
            which = f": it lacks {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}" if missing else ""
            raise UserError(f"{folder} has {len(classes)} classes, not {self.classes}{which}; complete it")
        names = {name: sorted(f.name for f in (folder / name).iterdir() if f.suffix.lower() in SUFFIXES) for name in classes}
        empty = [name for name in classes if not names[name]]
        if empty:
            raise UserError(f"{folder / empty[0]} holds no image ({', '.join(SUFFIXES)}); complete it")
        pairs = [(f"{name}/{file}", label) for label, name in enumerate(classes) for file in names[name]]
        return folder, [name for name, _ in pairs], [label for _, label in pairs]

    def names(self) -> Sequence[str]:
        """Those that torchvision's published weights have, in the order of the folders; none where classes are left out."""
        import torchvision

        weights = next(iter(torchvision.models.get_model_weights("vgg16_bn")))
        names: list[str] = weights.meta["categories"]
        return names if len(names) == self.classes or self.only_classes is not None else ()
