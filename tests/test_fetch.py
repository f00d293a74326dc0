"""scripts/fetch_data.py against an archive made on the spot, in the layout of the published one."""

import errno
import hashlib
import http.server
import importlib.util
import io
import tarfile
import threading
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gradexp.base.errors import UserError
from gradexp.engine.run import ROOT, Paths


@pytest.fixture
def script() -> Any:
    spec = importlib.util.spec_from_file_location("fetch_data", ROOT / "scripts" / "fetch_data.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def mirror(tmp_path: Path, script: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The three files, 67 classes of one training and one test image; the script knows their checksums."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    names = {kind: [f"kind{i:02}/{kind}.jpg" for i in range(67)] for kind in ("Train", "Test")}
    with tarfile.open(folder / "indoorCVPR_09.tar", "w") as archive:
        for number, name in enumerate(names["Train"] + names["Test"]):
            content = io.BytesIO()
            Image.new("RGB", (8, 8), (number, 0, 0)).save(content, "JPEG")
            member = tarfile.TarInfo(f"indoorCVPR_09/Images/{name}")
            member.size = len(content.getvalue())
            archive.addfile(member, io.BytesIO(content.getvalue()))
    for kind, lines in names.items():
        (folder / f"{kind}Images.txt").write_text("\r\n".join(lines))
    sums = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in script.MIT_SCENES}
    monkeypatch.setattr(script, "MIT_SCENES", {name: ("http://localhost:1/x", sums[name]) for name in sums})
    return folder


def paths(root: Path) -> Paths:
    return Paths(root / "data", root / "results", root / "outputs")


def test_it_fetches_verifies_and_does_only_what_is_missing(
    tmp_path: Path, mirror: Path, script: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    script.mit_scenes(paths(tmp_path), mirror.as_uri(), False)
    assert "67 + 67 images of 67 classes" in capsys.readouterr().out
    home = tmp_path / "data" / "mit_scenes"
    assert len(list((home / "Images").rglob("*.jpg"))) == 134
    assert not list(home.glob("*.part"))
    script.mit_scenes(paths(tmp_path), None, False)  # nothing to fetch
    assert "fetching" not in capsys.readouterr().out


def test_what_cannot_be_fetched_is_named_with_its_place(tmp_path: Path, mirror: Path, script: Any) -> None:
    home = tmp_path / "data" / "mit_scenes"
    (mirror / "TestImages.txt").rename(tmp_path / "kept")
    with pytest.raises(UserError) as caught:
        script.mit_scenes(paths(tmp_path), mirror.as_uri(), False)
    for part in ("mirror/TestImages.txt: ", f"Put the missing files into {home}", "--from ADDRESS"):
        assert part in str(caught.value)
    (tmp_path / "kept").rename(home / "TestImages.txt")
    script.mit_scenes(paths(tmp_path), mirror.as_uri(), False)
    with pytest.raises(UserError, match="http://localhost:1/x: "):
        script.mit_scenes(paths(tmp_path / "elsewhere"), None, False)


def test_other_files_are_refused_unless_they_are_wanted(tmp_path: Path, mirror: Path, script: Any) -> None:
    lines = (mirror / "TrainImages.txt").read_text().split("\n")
    (mirror / "TrainImages.txt").write_text("\n".join(lines[::-1]))
    with pytest.raises(UserError, match=r"TrainImages.txt has the MD5 sum .* --unverified"):
        script.mit_scenes(paths(tmp_path), mirror.as_uri(), False)
    with pytest.raises(UserError, match=r"TrainImages.txt has the MD5 sum"):  # typing it again does not make it right
        script.mit_scenes(paths(tmp_path), mirror.as_uri(), False)
    script.mit_scenes(paths(tmp_path), mirror.as_uri(), True)
    archive = tmp_path / "data" / "mit_scenes" / "indoorCVPR_09.tar"
    archive.write_bytes(archive.read_bytes()[:700])
    with pytest.raises(UserError, match="cannot be extracted"):
        script.extract(archive, tmp_path / "again")
    with tarfile.open(archive, "w"):
        pass
    with pytest.raises(UserError, match="has no folder Images/"):
        script.extract(archive, tmp_path / "again")


def test_a_full_disk_is_not_blamed_on_the_archive(tmp_path: Path, mirror: Path, script: Any, monkeypatch: Any) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "extract", full)
    with pytest.raises(OSError, match="No space left"):
        script.mit_scenes(paths(tmp_path), mirror.as_uri(), False)


class Cut(http.server.BaseHTTPRequestHandler):
    """Closes the connection in the middle of each file, however its length is declared."""

    def do_GET(self) -> None:
        self.send_response(200)
        if "chunked" in self.path:
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"100\r\nhalf")
        elif "length" in self.path:
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"half")
        else:
            self.wfile.write(b"no header ends")
        self.close_connection = True

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize("how", ["chunked", "length", "header", "no server", "no address"])
def test_a_download_that_fails_leaves_nothing(tmp_path: Path, script: Any, how: str) -> None:
    with http.server.ThreadingHTTPServer(("localhost", 0), Cut) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = {"no server": "http://localhost:1", "no address": "nowhere"}.get(
            how, f"http://localhost:{server.server_port}/{how}"
        )
        with pytest.raises(UserError, match="some files could not be downloaded") as caught:
            script.mit_scenes(paths(tmp_path), address, False)
        server.shutdown()
    assert f"{address}/TestImages.txt: " in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_download_leaves_nothing(
    tmp_path: Path, mirror: Path, script: Any, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def interrupted(*_: Any) -> None:
        raise error

    monkeypatch.setattr(script.shutil, "copyfileobj", interrupted)
    with pytest.raises(error):
        script.mit_scenes(paths(tmp_path), mirror.as_uri(), False)
    assert not (tmp_path / "data").exists()


def test_an_archive_that_is_cut_off_leaves_no_images(tmp_path: Path, mirror: Path, script: Any) -> None:
    archive = mirror / "indoorCVPR_09.tar"
    archive.write_bytes(archive.read_bytes()[:-30000])
    with pytest.raises(UserError, match="cannot be extracted"):
        script.extract(archive, tmp_path / "home")
    assert not list((tmp_path / "home").iterdir())
