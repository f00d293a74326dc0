"""MIT Scenes: 15,620 photographs of 67 indoor places (Quattoni and Torralba, 2009), about 80 + 20 of each in its lists."""

from __future__ import annotations

from pathlib import Path

from gradexp.base.errors import UserError
from gradexp.data.folder import FolderData

LISTS = {"train": "TrainImages.txt", "test": "TestImages.txt"}


class MITScenes(FolderData):
    def files(self, split: str) -> tuple[Path, list[str], list[int]]:
        home = self.root / "mit_scenes"
        missing = [name for name in ("Images", *LISTS.values()) if not (home / name).exists()]
        if missing:
            raise UserError(
                f"MIT Scenes not found: {home} has no {', '.join(missing)}. python scripts/fetch_data.py mit_scenes "
                f"fetches it, or says what to put there; see docs/data.md"
            )
        listed = {name: _lines(home / file) for name, file in LISTS.items()}
        names = listed[split]
        classes = sorted({name.partition("/")[0] for entries in listed.values() for name in entries})
        if not self.complete(len(classes)):
            raise UserError(f"{home}: the lists name {len(classes)} classes, not {self.classes}; fetch them again")
        empty = sorted(set(classes) - {name.partition("/")[0] for name in names})
        if empty:
            raise UserError(f"{home / LISTS[split]} lists no image of {', '.join(empty[:5])}; fetch it again")
        absent = [name for name in names if not (home / "Images" / name).is_file()]
        if absent:
            raise UserError(
                f"{home / 'Images'}: {len(absent)} of {len(names)} listed images are missing, such as {absent[0]}; "
                f"extract the archive again"
            )
        return home / "Images", names, [classes.index(name.partition("/")[0]) for name in names]


def _lines(file: Path) -> list[str]:
    return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
