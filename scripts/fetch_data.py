"""python scripts/fetch_data.py mit_scenes: downloads a data set that torchvision does not download, and verifies it.

What can't be downloaded is named with the folder to put it into; run the command again, and it goes on from there. CIFAR and
MNIST are downloaded at their first use; ImageNet is never downloaded.
"""

import argparse
import contextlib
import hashlib
import shutil
import tarfile
import urllib.request
from http.client import HTTPException
from pathlib import Path, PurePosixPath

from gradexp.base.errors import UserError, nearest
from gradexp.base.files import draft_of, move_into_place
from gradexp.engine.assemble import declare_data
from gradexp.engine.compose import compose_run
from gradexp.engine.exits import FIXES, exit_on_errors
from gradexp.engine.run import Paths

# MIT publishes no checksums; these MD5 sums come from a public reader of the data set.
MIT_SCENES = {
    "indoorCVPR_09.tar": (
        "http://groups.csail.mit.edu/vision/LabelMe/NewImages/indoorCVPR_09.tar",
        "5d176e5f0e56624a453f2fe0d8b19ff7",
    ),
    "TrainImages.txt": ("http://web.mit.edu/torralba/www/TrainImages.txt", "fd987513d0f623c424252770fac3f354"),
    "TestImages.txt": ("http://web.mit.edu/torralba/www/TestImages.txt", "f00bef137f39d51e4894303a7bf4c2d4"),
}
ARCHIVE = "indoorCVPR_09.tar"
CHUNK = 2**20  # bytes


def mit_scenes(paths: Paths, mirror: str | None, unverified: bool) -> None:
    """Puts the published archive and its lists into mit_scenes/ of the data root. Raises UserError with missing files."""
    home = paths.data / "mit_scenes"
    extracted = (home / "Images").exists()
    wanted = [name for name in MIT_SCENES if not (extracted and name == ARCHIVE)]
    errors = [error for name in wanted if (error := fetch(name, home, mirror))]
    for name in wanted:  # also files of an earlier download: one that was refused stays refused
        if (home / name).exists():
            verify(home / name, MIT_SCENES[name][1], unverified)
    if errors:
        raise UserError("\n".join(["some files could not be downloaded:", *errors, HELP.format(home=home)]))
    if not extracted:
        extract(home / ARCHIVE, home)
    data = declare_data(compose_run(["experiment=jacobian_transfer", "scale=paper"]), paths)
    counts = [len(data.splits()[split].names) for split in ("train", "test")]
    print(f"MIT Scenes is in {home}: {counts[0]} + {counts[1]} images of {data.classes} classes, all readable")


HELP = """Put the missing files into {home} and run this again:
  indoorCVPR_09.tar (2.4 GB; or its folder Images/), TrainImages.txt, TestImages.txt
or name an address (or file:///FOLDER) that has all three: --from ADDRESS"""


def fetch(name: str, home: Path, mirror: str | None) -> str | None:
    """Downloads a missing file; returns what went wrong, None otherwise. A download that fails leaves nothing behind."""
    file, address = home / name, f"{mirror.rstrip('/')}/{name}" if mirror else MIT_SCENES[name][0]
    if file.exists():
        return None
    made = [folder for folder in (home, *home.parents) if not folder.exists()]
    draft = draft_of(file)
    try:
        print(f"fetching {address}", flush=True)
        with urllib.request.urlopen(address, timeout=60) as source, draft.open("wb") as target:
            shutil.copyfileobj(source, target, CHUNK)
            expected = source.headers.get("Content-Length")
            if expected and target.tell() != int(expected):
                raise OSError(f"it broke off after {target.tell()} of {expected} bytes")
        move_into_place(draft, file)
    except (OSError, ValueError, HTTPException) as error:  # URLError is an OSError; ValueError: no address
        return f"  {address}: {error}"
    finally:
        draft.unlink(missing_ok=True)
        if not file.exists():
            with contextlib.suppress(OSError):  # not empty: another process uses it
                for folder in made:
                    folder.rmdir()
    return None


def verify(file: Path, checksum: str, unverified: bool) -> None:
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "md5").hexdigest()
    if found != checksum and not unverified:
        raise UserError(
            f"{file} has the MD5 sum {found}, expected {checksum}: delete it and run this again, or use it all the same with "
            f"--unverified"
        )


def extract(archive: Path, home: Path) -> None:
    """Extracts the folder Images/, at whatever depth of the archive it is."""
    draft = draft_of(home / "Images")
    print(f"extracting {archive}", flush=True)
    try:
        with tarfile.open(archive) as content:
            for member in content:
                parts = PurePosixPath(member.name).parts
                if member.isfile() and "Images" in parts:
                    member.name = "/".join(parts[parts.index("Images") + 1 :])
                    content.extract(member, draft, filter="data")
        if not draft.exists():
            raise UserError(f"{archive} has no folder Images/; delete it and run this again")
        draft.rename(home / "Images")
    except (tarfile.TarError, OSError) as error:
        if isinstance(error, OSError) and error.errno in FIXES:  # the archive may be intact
            raise
        raise UserError(f"{archive} cannot be extracted ({error}); delete it and run this again") from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    print(f"{archive} is no longer needed")


FETCHERS = {"mit_scenes": mit_scenes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help=", ".join(FETCHERS))
    parser.add_argument(
        "--from", dest="mirror", metavar="ADDRESS", help="where the files are, if not where they were published"
    )
    parser.add_argument("--unverified", action="store_true", help="use files whose checksum is not the expected one")
    parser.add_argument(
        "--set", nargs="*", action="extend", default=[], metavar="KEY=VALUE", help="of paths, such as paths.data=FOLDER"
    )
    given = parser.parse_args()
    with exit_on_errors():
        if given.name not in FETCHERS:
            raise UserError(f"{given.name} cannot be fetched{nearest(given.name, FETCHERS)} Available: {', '.join(FETCHERS)}")
        FETCHERS[given.name](Paths.of(compose_run(["experiment=teacher", *given.set])), given.mirror, given.unverified)


if __name__ == "__main__":
    main()
