"""What a config may name: only what was written to be built at that place."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from gradexp.base.errors import UserError
from gradexp.engine import compose, plugins
from gradexp.engine.build import KINDS, check_settings, kind_of, locate, targets
from gradexp.engine.command_line import check_overrides
from gradexp.engine.compose import compose_run
from gradexp.engine.ensure import ensure
from gradexp.engine.record import write_record
from gradexp.engine.run import ROOT, Paths, Run, run_id
from gradexp.engine.verify import Finding, verify
from gradexp.report import specs

# Each of these has run code, or written a file, when it was named in a config; or would, at this place.
HOSTILE = [
    ("logger.group", "torch.utils.collect_env.run"),
    ("logger", "torch.utils.collect_env.run"),
    ("model", "torch.hub.load"),
    ("model", "torch.load"),
    ("model", "torch.utils.cpp_extension.load_inline"),
    ("model", "torch.nn.Linear"),  # a class of another kind than the place's
    ("data", "torchvision.datasets.utils.download_url"),
    ("data", "gradexp.data.sources.load"),  # a function beside the data sets
    ("optim.optimizer", "torch.save"),
    ("optim.schedule", "os.system"),
    ("task", "gradexp.base.files.write_atomically"),
    ("task", "gradexp.tasks.train.make_student"),  # a function beside the tasks
    ("task", "gradexp.saliency.__main__.main"),
    ("saliency", "gradexp.saliency.__main__.main"),
    ("method.terms.cross_entropy", "builtins.eval"),
    ("method.terms.cross_entropy", "gradexp.terms.step.Step"),  # a class beside the terms
    ("evaluate", "subprocess.Popen"),
    ("draw", "gradexp.report.writing.write_beside"),
    ("paths", "gradexp.models.vgg.VGG"),  # a place where nothing is built
]


@pytest.mark.parametrize(("where", "target"), HOSTILE)
def test_what_was_not_meant_for_a_place_is_refused(where: str, target: str) -> None:
    with pytest.raises(UserError, match="is refused"):
        locate(target, where)


@pytest.mark.parametrize("where", ["logger.group", "method.terms.cross_entropy", "upstream.teacher.model", "task.x"])
def test_no_place_of_a_config_is_overlooked(where: str) -> None:
    """Names in places where nothing is built, in upstream runs and in lists are found before any work."""
    config: dict[str, Any] = copy.deepcopy(compose_run(["experiment=jacobian_distill", "scale=quick"]))
    check_settings(config)
    *path, last = where.split(".")
    node = config
    for key in path:
        node = node[key]
    node[last] = [{"_target_": "os.system", "command": "true"}]
    with pytest.raises(UserError, match=r"os\.system is refused"):
        check_settings(config)


def test_a_module_of_a_method_is_a_name_too() -> None:
    config = copy.deepcopy(compose_run(["experiment=teacher", "scale=quick"]))
    config["method"]["module"] = "gradexp.training.optim.Optim"
    assert ("method.module", {"_target_": "gradexp.training.optim.Optim"}) in list(targets(config))
    with pytest.raises(UserError, match="LightningModule"):
        locate("gradexp.training.optim.Optim", "method.module")


def test_everything_that_the_configs_and_committed_records_name_is_allowed() -> None:
    found = set()
    for file in (ROOT / "results" / "runs").glob("*/*.json"):
        found |= {(where, node["_target_"]) for where, node in targets(json.loads(file.read_text())["config"])}
    for number in specs.numbers("figure"):
        found.add(("draw", specs.load("figure", number)["draw"]))
    for where, target in found:
        locate(target, where)
    # `launcher` is in no record; every other kind has been seen, so that none of them is allowed for nothing.
    assert {kind_of(where) for where, _ in found} == KINDS.keys() - {"launcher"}


def test_a_record_is_verified_without_running_what_it_names(places: list[str], tmp_path: Path) -> None:
    words = ["experiment=teacher", "scale=quick", "scale.width=0.04", "optim.passes=1", "data.per_class=3", "logger=none"]
    config = compose_run([*words, *places])
    run = Run(config, Paths.of(config))
    ensure(run)
    record = json.loads(run.record_path.read_text())
    written = tmp_path / "executed"
    command = {"_target_": "torch.utils.collect_env.run", "command": f"touch {written}"}
    run.record_path.unlink()
    for name, hostile in (("logger", {**record["config"]["logger"], "group": command}), ("model", command)):
        edited = {**record["config"], name: hostile}
        write_record(run.record_path.with_stem(run_id(edited)), {**record, "config": edited, "id": run_id(edited)})
        extra = {key: config[key] for key in ("trainer", "logger", "gradients")}
        found = [line.what for line in verify(run.paths, sample=1, seed=0, extra=extra) if isinstance(line, Finding)]
        assert any("is refused" in what for what in found)
        assert not written.exists()
    with pytest.raises(UserError, match="is refused"):
        ensure(Run({**config, "seed": 5, "logger": {**config["logger"], "group": command}}, run.paths))
    assert not written.exists()


@pytest.fixture
def own_conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder conf/ of a package of the user's own."""
    conf = tmp_path / "mine" / "conf"
    for group in ("experiment", "data"):
        (conf / group).mkdir(parents=True)
    (tmp_path / "mine" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("GRADEXP_PLUGINS", "mine")
    for function in (compose._compose, compose._by_hydra, compose._plain_settings, plugins._folder):
        function.cache_clear()
    return conf


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "name: theirs\nupstream: {teacher: {experiment: theirs}}",
            r"upstream\.teacher of experiment theirs depends on itself",
        ),
        (
            "name: theirs\nupstream: {teacher: teacher}",
            r"=teacher: expected .* upstream\.teacher=\{experiment: NAME\}",
        ),
        ("name: theirs # \xff", r"theirs\.yaml is not UTF-8"),
    ],
)
def test_an_experiment_whose_upstream_runs_can_not_be_is_refused(text: str, message: str, own_conf: Path) -> None:
    lines = f"# @package _global_\ndefaults: [jacobian_distill, _self_]\n{text}\n"
    (own_conf / "experiment" / "theirs.yaml").write_bytes(lines.encode("latin-1"))
    with pytest.raises(UserError, match=message):
        check_overrides(["experiment=theirs", "scale=quick"])


CALLBACKS = "callbacks: {x: {_target_: os.system, command: 'true'}}"
TEACHER = "# @package _global_\ndefaults: [teacher, _self_]\n"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (f"{TEACHER}hydra:\n  {CALLBACKS}\n", "hydra.callbacks"),
        (f'{TEACHER}"\\x68ydra":\n  {CALLBACKS}\n', "hydra.callbacks"),
        (f'# @package _global_\n{{"defaults": ["teacher"], objective: "#", hydra: {{{CALLBACKS}}}}}\n', "hydra.callbacks"),
        (f"{TEACHER}# a comment\x85hydra:\n  {CALLBACKS}\n", "hydra.callbacks"),  # YAML's third kind of line break
        (f'{TEACHER}? !!str "hy\\\n  dra"\n: {{{CALLBACKS}}}\n', "hydra.callbacks"),
        (f"# @package hydra\n{CALLBACKS}\n", "hydra.callbacks"),
        (f" # @package hydra\n{CALLBACKS}\n", "hydra.callbacks"),
        ("# @package _global_\ndefaults: [teacher, {override /hydra/hydra_logging: disabled}]\n", "hydra.hydra_logging"),
        ("# @package _global_\ndefaults: [teacher, /data/theirs@hydra.callbacks]\n", "hydra.callbacks"),
        (f'{TEACHER}hydra: {{job_logging: {{formatters: {{x: {{"()": os.system}}}}}}}}\n', "hydra.job_logging"),
        (f"{TEACHER}hydra: {{job: {{env_set: {{PYTHONPATH: theirs}}}}}}\n", "hydra.job"),
        (f"{TEACHER}paths: {{results: theirs}}\n", "paths.results"),
    ],
)
def test_an_experiment_can_not_configure_hydra(text: str, key: str, own_conf: Path) -> None:
    (own_conf / "data" / "theirs.yaml").write_text("x: {_target_: os.system, command: 'true'}\n")
    (own_conf / "experiment" / "theirs.yaml").write_text(text)
    with pytest.raises(UserError, match=rf"a file of conf/ sets {re.escape(key)}, which only"):
        check_overrides(["experiment=theirs", "scale=quick", "hydra.verbose=false", "paths.outputs=mine"])


def test_a_user_configures_hydra_and_folders_on_the_command_line() -> None:
    (config,) = check_overrides(["experiment=teacher", "scale=quick", "hydra/launcher=joblib", "paths.outputs=mine"])
    assert config["paths"]["outputs"] == "mine"
