"""Every file that people, disks or other runs may have damaged or replaced: one line, or made again; nothing lost."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from gradexp.base import files
from gradexp.base.errors import UserError
from gradexp.base.texts import read_json, read_yaml
from gradexp.data.removal import Removal
from gradexp.engine import compose
from gradexp.engine.run import ROOT
from gradexp.report import claims, specs

NOT_YAML = {
    "a tab": b"rows:\n\t- a\n",
    "a key twice": b"title: x\ntitle: y\n",
    "a key twice below": b"rows:\n  - {label: a, label: b}\n",
    "an open list": b"rows: [a\n",
    "another encoding": "title: é\n".encode("latin-1"),
    "UTF-16": "title: x\n".encode("utf-16"),
    "an object": b"!!python/object/apply:os.system [true]\n",
    "bytes": bytes(range(256)),
}


def one_line(error: pytest.ExceptionInfo[UserError]) -> None:
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("content", NOT_YAML.values(), ids=list(NOT_YAML))
@pytest.mark.parametrize("kind", ["table", "figure", "report", "claims", "method"])
def test_yaml_that_is_none(kind: str, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conf = tmp_path / "conf"
    if kind == "method":
        shutil.copytree(ROOT / "conf", conf)
        monkeypatch.setattr(compose, "CONF", conf)
        (conf / "method" / "broken.yaml").write_bytes(content)
        compose._by_hydra.cache_clear()
        with pytest.raises(UserError) as error:
            compose.compose_run(["experiment=teacher", "scale=quick", "method=broken"])
        one_line(error)
        return
    monkeypatch.setattr(specs, "ROOT", tmp_path)
    name = {"table": "table/9.yaml", "figure": "figure/9.yaml"}.get(kind, f"{kind}.yaml")
    (conf / name).parent.mkdir(parents=True)
    (conf / name).write_bytes(content)
    with pytest.raises(UserError, match=r"YAML|UTF-8") as error:
        if kind == "report":
            specs.settings()
        elif kind == "claims":
            claims.load(conf / name)
        else:
            specs.load(kind, "9")
    one_line(error)


@pytest.mark.parametrize("content", ["", "[]", "3", "text", "claims: []", "close: x", "- a"])
def test_yaml_of_another_form(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(specs, "ROOT", tmp_path)
    (tmp_path / "conf" / "table").mkdir(parents=True)
    for name in ("report.yaml", "claims.yaml", "table/9.yaml"):
        (tmp_path / "conf" / name).write_text(content)
    for read in (specs.settings, lambda: claims.load(tmp_path / "conf" / "claims.yaml"), lambda: specs.load("table", "9")):
        with pytest.raises(UserError) as error:
            read()
        one_line(error)


def test_yaml_may_merge_mappings(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n")
    assert read_yaml(tmp_path / "x.yaml")["b"] == {"x": 1, "y": 3}


@pytest.mark.parametrize("entries", ["rows", "columns"])
def test_two_rows_or_columns_of_one_label_are_refused(entries: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = specs.load("table", "2.1")
    content[entries] = [*content[entries], content[entries][0]]
    monkeypatch.setattr(specs, "ROOT", tmp_path)
    (tmp_path / "conf" / "table").mkdir(parents=True)
    (tmp_path / "conf" / "table" / "2.1.yaml").write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"two {entries} have the label"):
        specs.load("table", "2.1")


def test_every_committed_spec_is_read() -> None:
    for kind in ("table", "figure"):
        for number in specs.numbers(kind):
            assert specs.load(kind, number)["number"] == number
    assert specs.read_thesis()


HEAD = "item,row,column,metric,value,std,bold,n_runs,source\n"
LINE = "2.1,CE,1,test accuracy (%),5.69,,0,1,thesis\n"


@pytest.mark.parametrize(
    "content",
    ["", HEAD, "item,row\n", HEAD + LINE + LINE, HEAD + LINE.replace("5.69", "high"), HEAD + LINE + "a,b\n", HEAD + '"open\n'],
    ids=["empty", "head only", "columns", "a line twice", "no number", "a short line", "an open quote"],
)
def test_numbers_of_the_thesis_that_are_none(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(content.encode(), tmp_path, monkeypatch)


@pytest.mark.parametrize(
    "change", [lambda text: text.encode("utf-16"), lambda text: text.encode() * 2, lambda text: b"\xff" + text.encode()]
)
def test_the_thesis_in_another_encoding_or_doubled(change: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken(change((ROOT / "results" / "thesis.csv").read_text(encoding="utf-8")), tmp_path, monkeypatch)


def broken(content: bytes, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "results").mkdir()
    (folder / "results" / "thesis.csv").write_bytes(content)
    monkeypatch.setattr(specs, "ROOT", folder)
    specs.read_thesis.cache_clear()
    try:
        with pytest.raises(UserError, match=r"thesis.csv can't be read .* restore it with git") as error:
            specs.read_thesis()
        one_line(error)
    finally:
        specs.read_thesis.cache_clear()


NOT_JSON = [b"", b"{", b"[]", b"null", b"3", b"\xff\xfe\x00", b"[" * 100000]


@pytest.mark.parametrize("content", NOT_JSON, ids=lambda content: ascii(content[:8]))
def test_json_that_is_none(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    file.write_bytes(content)
    (tmp_path / "maps.json").write_bytes(content)
    readers = {
        "make bench": lambda: read_json(file, "measure again: make bench"),
        "the maps are computed again": lambda: Removal(fraction=0.5).open(tmp_path, {}),
    }
    for words, read in readers.items():
        with pytest.raises(UserError, match=words) as error:
            read()
        one_line(error)


@pytest.mark.parametrize("sha256", [{}, None, [], {"train.npy": "0"}, {"../x": "0"}])
def test_maps_without_their_digests_are_refused(sha256: Any, tmp_path: Path) -> None:
    for name in ("train.npy", "test.npy"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "maps.json").write_text(json.dumps({"sha256": sha256, "data": {}}))
    with pytest.raises(UserError, match="missing or damaged; delete"):
        Removal(fraction=0.5).open(tmp_path, {})


@pytest.mark.parametrize("seal", [b"\xff\xfe\x80", b"", b"0" * 64, bytes(range(256))])
def test_a_damaged_seal_is_no_seal_of_this_file(seal: bytes, tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    files.write_sealed(file, b"old")
    (tmp_path / "weights.pt.sha256").write_bytes(seal)
    assert not files.intact(file)
    files.write_sealed(file, b"new")
    assert files.intact(file)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no archive"])
def test_weights_that_can_not_be_read(content: bytes, tmp_path: Path) -> None:
    from gradexp.engine.assemble import load_weights
    from gradexp.engine.task import Finished

    (tmp_path / "weights.pt").write_bytes(content)
    finished: Any = Finished(None, {}, tmp_path / "weights.pt")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="delete its folder") as error:
        load_weights(finished)
    one_line(error)


@pytest.mark.parametrize("fault", ["other run", "no archive", "other state"])
def test_a_checkpoint_of_another_run_is_set_aside(fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gradexp.engine.callbacks import Checkpointer

    path = tmp_path / "last.ckpt"

    def write(run: str) -> None:
        files.write_sealed(path, lambda draft: torch.save({"callbacks": {"Checkpointer": {"run": run}}}, draft))

    write("a" * 12)
    assert Checkpointer(path, every=60, run="a" * 12).usable()
    if fault == "other run":
        write("b" * 12)
    elif fault == "no archive":
        files.write_sealed(path, b"x")
    else:
        files.write_sealed(path, lambda draft: torch.save([1], draft))
    assert not Checkpointer(path, every=60, run="a" * 12).usable()
    assert "is set aside: training begins anew" in capsys.readouterr().out
    assert not path.exists()
    assert not Checkpointer(path, every=60, run="a" * 12).usable()


@pytest.mark.parametrize("fault", ["other run", "other piece", "no archive", "other content", "seal gone"])
def test_a_piece_of_another_run_is_made_again(fault: str, tmp_path: Path) -> None:
    from gradexp.engine.evaluation import Pieces

    class Hardware:
        def facts(self, *, mixed: bool) -> dict[str, str]:
            return {"device": "cpu", "precision": "32", "threads": 1}

    def pieces(name: str, folder: Path) -> Pieces:
        run: Any = type("R", (), {"name": "x", "id": name, "pieces": folder})()
        return Pieces(run, Hardware(), {})  # type: ignore[arg-type]

    calls: list[int] = []

    def make(number: int, item: int) -> int:
        calls.append(number)
        return item * 10

    mine, other = pieces("a" * 12, tmp_path / "a"), pieces("b" * 12, tmp_path / "b")
    assert mine.each("n", [1, 2], make) == [10, 20]
    other.each("n", [5, 6], make)
    file = mine.folder / "n_0.pt"
    if fault in ("other run", "other piece"):
        source = other.folder / "n_0.pt" if fault == "other run" else mine.folder / "n_1.pt"
        for suffix in ("", ".sha256"):
            shutil.copy(f"{source}{suffix}", f"{file}{suffix}")
    elif fault == "seal gone":
        Path(f"{file}.sha256").unlink()
        file.write_bytes(file.read_bytes()[:50])
    elif fault == "no archive":
        files.write_sealed(file, b"x")
    else:
        files.write_sealed(file, lambda draft: torch.save({"piece": 3}, draft))
    calls.clear()
    assert pieces("a" * 12, tmp_path / "a").each("n", [1, 2], make) == [10, 20]
    assert calls == [0]
