"""What happens when things go wrong, tried: kills, signals, full disks, crowds, jumping clocks, damaged and forged files.

python scripts/reliability.py                 all trials, to docs/reliability.md
python scripts/reliability.py --kills 4       a short one, printed only, as is --soak:
python scripts/reliability.py --soak 60       quick runs by two clones for an hour, disturbed at random, against calm ones
"""

import argparse
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import connection
from pathlib import Path
from typing import Any

from gradexp.base.files import sha256, write_atomically
from gradexp.engine.launchers import Work, start_process
from gradexp.engine.origin import git_state
from gradexp.engine.record import read_record
from gradexp.engine.run import ROOT
from gradexp.report.writing import table_lines

TINY = ("scale=quick", "scale.width=0.04", "data.per_class=8", "trainer.threads=1", "trainer.strict=true", "logger=none")
BELOW = ("optim.passes=30", "trainer.checkpoint_every=0")
EXPERIMENTS = {
    "training": ("experiment=teacher", *TINY, *BELOW),
    "teacher targets": (
        *("experiment=jacobian_distill", "method=ce_a_j", *TINY, *BELOW, "data.crop=0"),
        *("+upstream.teacher.optim.passes=2", "+upstream.teacher.scale.width=0.03"),
    ),
    "saliency maps": (
        *("experiment=saliency_maps", *TINY, "trainer.checkpoint_every=0"),
        *("+upstream.model.optim.passes=2", "+upstream.model.scale.width=0.03"),
    ),
    "denoised images": (
        *("experiment=implicit_samples", *TINY, "task.denoising.steps=20", "task.sampling.steps=20"),
        *("+upstream.model.optim.passes=1", "+upstream.model.model.width=0.03"),
    ),
}
# Of a record, what may differ between two repeats: when, how long, how fast, and on what.
PASSING = (
    "record_sha256",
    "seconds",
    "started",
    "ended",
    "images_per_second",
    "peak_memory_mib",
    "git",
    "versions",
    "threads",
    "device",
)


@dataclass(frozen=True)
class Trial:
    """What was done, how often, whether all went as it should, and what the user read."""

    what: str
    times: int
    good: int
    message: str


class WrongError(Exception):
    """A trial did not end as it should."""


def work(place: Path, words: Sequence[str], *more: str) -> Work:
    """A run with its results and outputs below `place`."""
    folders = (f"paths.results={place}/results", f"paths.outputs={place}/outputs")
    log = place / "logs" / f"{abs(hash((*words, *more)))}.txt"
    return Work((*words, *more, *folders), log)


# To start a process, multiprocessing reads the exit codes of all that have ended; a thread that joins one of them at the same
# time gets 255 instead of its code.
_EXIT_CODES = threading.Lock()


def started(task: Callable[..., None], *arguments: Any) -> Any:
    """A process that does task(*arguments); several threads may start some at the same time."""
    with _EXIT_CODES:
        return start_process(task, *arguments)


def exit_code(process: Any) -> int:
    """Waits for a process of `started`."""
    connection.wait([process.sentinel])
    with _EXIT_CODES:
        process.join()
    return int(process.exitcode)


def finish(task: Callable[[], None]) -> int:
    return exit_code(started(task))


def left(place: Path) -> dict[str, Any]:
    """What runs left that must be the same however they were disturbed: records without what passes, weights, maps."""
    found: dict[str, Any] = {}
    for file in sorted(place.glob("results/runs/*/*.json")):
        found[file.stem] = {key: value for key, value in read_record(file).items() if key not in PASSING}
        found[file.stem]["config"] = {key: value for key, value in found[file.stem]["config"].items() if key != "trainer"}
    for pattern in ("weights.pt", "*.npy"):
        found |= {f"{file.parent.name}/{file.name}": sha256(file) for file in place.glob(f"outputs/runs/*/*/{pattern}")}
    return found


def expect(condition: bool, why: str) -> None:
    if not condition:
        raise WrongError(why)


def last(task: Work) -> str:
    lines = task.log.read_text().splitlines() if task.log.exists() else []
    return lines[-1] if lines else ""


# --- kills ------------------------------------------------------------------------------------------------


def kills(name: str, count: int, folder: Path, chance: random.Random) -> Trial:
    """SIGKILL at `count` random moments of a run, each followed by a second attempt that must end as if nothing had been."""
    words = EXPERIMENTS[name]
    whole = folder / "whole"
    begun = time.monotonic()
    expect(finish(work(whole, words)) == 0, f"{name}: the undisturbed run failed: {last(work(whole, words))}")
    length, expected, good = time.monotonic() - begun, left(whole), 0
    for number in range(count):
        place = folder / str(number)
        process = started(work(place, words))
        process.join(chance.uniform(0, length))
        process.kill()
        process.join()
        records = list(place.glob("results/runs/*/*.json"))
        expect(all(read_record(file) for file in records), "a record is not whole")
        expect(finish(work(place, words)) == 0, last(work(place, words)))
        expect(left(place) == expected, f"{name}, killed: not what the undisturbed run left; see {place}")
        expect(not list(place.glob("results/runs/*/.*")), "a draft was left among the records")
        good += 1
    return Trial(f"SIGKILL at a random moment: {name}", count, good, "the second attempt leaves the same bytes")


def kills_while_recording(count: int, folder: Path, chance: random.Random) -> Trial:
    """SIGKILL between the last step and the record."""
    words, good = EXPERIMENTS["training"], 0
    expect(finish(work(folder / "whole", words)) == 0, "the undisturbed run failed")
    expected = left(folder / "whole")
    for number in range(count):
        place = folder / str(number)
        process = started(work(place, words))
        while process.is_alive() and not list(place.rglob("weights.pt*")):
            time.sleep(0.0005)
        process.join(chance.uniform(0, 0.02))
        process.kill()
        process.join()
        expect(finish(work(place, words)) == 0, last(work(place, words)))
        expect(left(place) == expected, f"not what the undisturbed run left; see {place}")
        good += 1
    return Trial("SIGKILL while weights and record are written", count, good, "the second attempt leaves the same bytes")


# --- crowds -----------------------------------------------------------------------------------------------


def crowd(size: int, folder: Path) -> Trial:
    """`size` processes at a time, every run of one small table wanted `size` times."""
    small = [*EXPERIMENTS["teacher targets"], "optim.passes=2", "trainer.checkpoint_every=60"]
    runs = [(*small, f"method={method}") for method in ("ce", "a", "ce_a_j")]
    for words in runs:
        expect(finish(work(folder / "alone", words)) == 0, "the undisturbed run failed")
    with ThreadPoolExecutor(size) as pool:
        codes = list(
            pool.map(lambda i: [finish(work(folder / "crowd", words, f"logger.group=g{i}")) for words in runs], range(size))
        )
    expect(not any(map(any, codes)), "a process failed")
    alone, together = (_without_logger(left(folder / name)) for name in ("alone", "crowd"))
    expect(alone == together, "the records differ from those of one process")
    return Trial(
        f"{size} processes on one table", 1, 1, f"{len(list(folder.glob('crowd/results/runs/*/*.json')))} records, each once"
    )


def _without_logger(found: dict[str, Any]) -> dict[str, Any]:
    for value in found.values():
        if isinstance(value, dict):
            value["config"].pop("logger")
    return found


# --- disks ------------------------------------------------------------------------------------------------


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """A small file system of its own at `folder`. Raises PermissionError where that is not allowed."""
    folder.mkdir(parents=True)
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode:
        raise PermissionError
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def full_disk(size: str, folder: Path) -> Trial:
    words, place = EXPERIMENTS["teacher targets"], folder / "place"
    expect(finish(work(folder / "whole", words)) == 0, "the undisturbed run failed")
    with mounted(place / "outputs", f"size={size}"):
        task = work(place, words)
        expect(finish(task) == 1, f"a full disk of {size} did not end the run with exit code 1: {last(task)}")
        message = last(task)
        expect("the disk is full" in message, f"no clear message: {message}")
        expect(not list(place.glob("results/runs/jacobian_distill/*.json")), "a record was written")
        subprocess.run(["mount", "-o", "remount,size=64m", place / "outputs"], check=True)
        expect(finish(work(place, words)) == 0, last(task))
        expect(left(place) == left(folder / "whole"), "not what the undisturbed run left")
    return Trial(f"a disk of {size} fills up, then has room", 1, 1, _plain(message, folder))


def read_only(folder: Path) -> Trial:
    words, place = EXPERIMENTS["training"], folder / "place"
    with mounted(place / "results", "ro"):
        task = work(place, words)
        expect(finish(task) == 1, "it did not end with exit code 1")
        expect("read-only" in last(task), f"no clear message: {last(task)}")
    return Trial("a read-only results folder", 1, 1, _plain(last(task), folder))


# --- clocks -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Jumping:
    """A piece of work whose wall clock jumps by up to a day, back and forth, whenever it is read."""

    task: Work

    def __call__(self) -> None:
        true = time.time
        time.time = lambda: true() + random.uniform(-86400, 86400)
        self.task()


def jumping_clock(folder: Path) -> Trial:
    words = EXPERIMENTS["teacher targets"]
    expect(finish(work(folder / "steady", words)) == 0, "the undisturbed run failed")
    expect(finish(Jumping(work(folder / "jumping", words))) == 0, last(work(folder / "jumping", words)))
    expect(left(folder / "steady") == left(folder / "jumping"), "the records differ")
    return Trial("a wall clock that jumps by up to a day (mocked)", 1, 1, "the same bytes; durations are monotonic")


# --- damaged files ----------------------------------------------------------------------------------------


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)


def damaged(what: str, pattern: str, message: str, folder: Path, *, stops: bool) -> Trial:
    """Damages a file that a run left half-way, or that it needs, and tries again."""
    words, place = EXPERIMENTS["teacher targets"], folder / "place"
    expect(finish(work(folder / "whole", words)) == 0, "the undisturbed run failed")
    process = started(work(place, words))
    while process.is_alive() and not list(place.glob("outputs/runs/jacobian_distill/*/last.ckpt")):
        time.sleep(0.001)
    process.kill()
    process.join()
    files = list(place.glob(pattern))
    expect(bool(files), f"there is no {pattern}")
    for file in files:
        damage(file)
    task = work(place, words)
    code, text = finish(task), task.log.read_text()
    shown = next((line for line in text.splitlines() if message in line), "")
    expect(bool(shown), f"no clear message: {text[-500:]}")
    expect("Traceback" not in text, f"a traceback: {text[-500:]}")
    expect(code == int(stops), f"exit code {code}")
    if not stops:
        expect(left(place) == left(folder / "whole"), "not what the undisturbed run left")
    return Trial(f"a damaged {what}", 1, 1, _plain(shown, folder))


def damaged_parquet(folder: Path) -> Trial:
    data = folder / "data" / "cifar10"
    data.mkdir(parents=True)
    for name in ("train-0.parquet", "test-0.parquet"):
        (data / name).write_bytes(f"PAR1 and then nothing of use in {name} PAR1".encode())
    task = work(folder, EXPERIMENTS["training"], "data=cifar10", f"paths.data={folder}/data")
    expect(finish(task) == 1, "it did not end with exit code 1")
    expect("can't be used" in last(task), f"no clear message: {last(task)}")
    return Trial("a damaged parquet file", 1, 1, _plain(last(task), folder))


def _plain(text: str, folder: Path) -> str:
    text = re.sub(r"\.[^./ ]+\.\d+\.[0-9a-f]{16}", "...", text)  # host, process and random digits of a draft
    return text.replace(f"{folder}/", "")


# --- signals ----------------------------------------------------------------------------------------------

TOGETHER = ("trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu")
STOPPING = {  # (who gets a signal, which, the exit code)
    "a training process": ("rank", signal.SIGTERM, 143),
    "another training process": ("other rank", signal.SIGUSR1, 143),
    "the command": ("parent", signal.SIGTERM, 143),
    "the command, with Ctrl-C": ("parent", signal.SIGINT, -2),
    "the command, as SLURM does": ("parent", signal.SIGUSR2, 143),
    "all processes": ("group", signal.SIGTERM, 143),
    "all processes, with Ctrl-C": ("group", signal.SIGINT, -2),
}


def command(place: Path, words: Sequence[str], *, root: Path = ROOT, outputs: Path | None = None) -> "subprocess.Popen[str]":
    """`python run.py` of the code in `root`, in a process group of its own, which Ctrl-C may end."""
    return subprocess.Popen(
        [sys.executable, "run.py", *words, f"paths.results={place}/results", f"paths.outputs={outputs or place / 'outputs'}"],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def training_processes(pid: int) -> list[int]:
    """The child processes that train, in the order of their ranks."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def signalled(who: str, folder: Path) -> Trial:
    """A signal in the middle of a training by two processes, and a second attempt."""
    to, number, expected = STOPPING[who]
    words = (*EXPERIMENTS["training"], *TOGETHER)
    whole = command(folder / "whole", words)
    output, _ = whole.communicate()
    expect(whole.returncode == 0, f"the undisturbed run failed: {output}")
    place = folder / "place"
    stopped = command(place, words)
    while stopped.poll() is None and not list(place.glob("outputs/runs/*/*/last.ckpt")):
        time.sleep(0.01)
    ranks, begun = training_processes(stopped.pid), time.monotonic()
    if to == "group":
        os.killpg(stopped.pid, number)
    else:
        os.kill({"parent": stopped.pid, "rank": ranks[0], "other rank": ranks[1]}[to], number)
    output, _ = stopped.communicate(timeout=60)
    expect(time.monotonic() - begun < 10, "it took more than 10 s to stop")
    expect(stopped.returncode == expected, f"exit code {stopped.returncode}: {output}")
    expect("the same command resumes from the last checkpoint" in output, f"no clear message: {output}")
    expect(not list(place.glob("results/runs/*/*.json")), "a record was written")
    again = command(place, words)
    output, _ = again.communicate()
    expect(again.returncode == 0, output)
    expect(left(place) == left(folder / "whole"), "not what the undisturbed run left")
    message = "exit code 143 within 10 s" if expected > 0 else "it dies of SIGINT within 10 s"
    return Trial(
        f"{number.name} to {who}, of a training by two", 1, 1, f"{message}; a checkpoint, from which the same bytes come"
    )


# --- shared results ---------------------------------------------------------------------------------------


def two_outputs(folder: Path) -> Trial:
    """Two processes with outputs of their own, as of two clones, on one folder of results."""
    words = (*EXPERIMENTS["training"], f"paths.results={folder}/results")
    tasks = [Work((*words, f"paths.outputs={folder}/{name}"), folder / f"{name}.txt") for name in ("first", "second")]
    processes = [started(task) for task in tasks]
    codes = [exit_code(process) for process in processes]
    texts = " ".join(task.log.read_text() for task in tasks)
    expect(codes == [0, 0], texts)
    expect("waiting for process " in texts, f"nobody waited: {texts}")
    expect(len(list(folder.glob("results/runs/*/*.json"))) == 1, "not one record")
    expect(len(list(folder.glob("*/runs/*/*/weights.pt"))) == 1, "the run was done twice")
    return Trial("two folders of outputs, one of results", 1, 1, "the run is done once; who waits names the process and host")


# --- what others hand in ----------------------------------------------------------------------------------


def hostile(folder: Path) -> Trial:
    """Configs that would run commands, or write elsewhere."""
    mark = folder / "mark"
    shell = f"{{_target_:torch.utils.collect_env.run,command:'touch {mark}'}}"
    configs = [
        f"logger.group={shell}",
        f"+model.activation={shell}",
        "optim.optimizer._target_=os.system",
        "optim.optimizer._target_=torch.hub.load",
        "data._target_=torch.hub.download_url_to_file",
        "method.module=subprocess.Popen",
        "name=../../../escaped",
    ]
    for words in configs:
        task = work(folder, (*EXPERIMENTS["training"], words))
        expect(finish(task) == 1, f"{words} was accepted")
        text = task.log.read_text()
        expect(text.startswith("error: ") and text.count("\n") == 1, f"{words}: no clear message: {text[-500:]}")
        expect(not mark.exists(), f"{words} ran a command")
    theirs: dict[str, Any] = {
        "hydra": {"callbacks": {"x": {"_target_": "torch.utils.collect_env.run", "command": f"touch {mark}"}}}
    }
    for name, content in {"callback": theirs, "folder": {"paths": {"results": str(folder / "elsewhere")}}}.items():
        code = Clone(folder, name, "").root
        text = f"# @package _global_\n{json.dumps({'defaults': ['teacher', '_self_'], **content})}\n"
        (code / "conf" / "experiment" / "theirs.yaml").write_text(text)
        process = command(folder, ("experiment=theirs", *TINY), root=code)
        output, _ = process.communicate()
        expect(process.returncode == 1 and "which only conf/config.yaml may" in output, f"{name}: {output}")
        expect(not mark.exists(), f"{name} ran a command")
        configs.append(name)
    expect(not list(folder.rglob("results/runs/*/*.json")), "a record was written")
    count = len(configs)
    return Trial("configs and experiments that would run commands", count, count, "each is refused in a line; nothing is run")


def edited_record(folder: Path) -> Trial:
    """A better number, written into a record by hand, and make verify."""
    task = work(folder, EXPERIMENTS["training"])
    expect(finish(task) == 0, last(task))
    (file,) = folder.glob("results/runs/*/*.json")
    record = json.loads(file.read_text())
    record["metrics"]["test/accuracy"] += 1
    file.write_text(json.dumps(record))
    places = [f"paths.results={folder}/results", f"paths.outputs={folder}/outputs"]
    words = ["scripts/verify.py", "--sample", "1", "--set", *places, "trainer.threads=1"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    expect(done.returncode != 0, f"verify found nothing: {done.stdout}")
    line = next((line for line in done.stdout.splitlines() if file.name in line), done.stderr)
    return Trial("a number in a record changed by hand", 1, 1, _plain(line, folder))


def swapped_weights(folder: Path) -> Trial:
    """A teacher's weights replaced by those of another run, together with their checksum."""
    words, place = EXPERIMENTS["teacher targets"], folder / "place"
    expect(finish(work(folder / "whole", words)) == 0, "the undisturbed run failed")
    other = ("experiment=teacher", *TINY, "data.per_class=null", "optim.passes=1", "scale.width=0.03", "seed=5")
    expect(finish(work(place, other)) == 0, "the other run failed")
    expect(finish(work(place, (*words, "method=ce_a"))) == 0, "the first student failed")
    (source,) = _weights(place, seed=5)
    (target,) = _weights(place, seed=0)
    for suffix in ("", ".sha256"):
        target.with_name(target.name + suffix).write_bytes(source.with_name(source.name + suffix).read_bytes())
    task = work(place, words)
    expect(finish(task) == 0, last(task))
    expect(left(place).items() >= left(folder / "whole").items(), "a number of the wrong teacher was recorded")
    (line,) = [line for line in task.log.read_text().splitlines() if "replaced by those of another run" in line]
    return Trial("a teacher's weights swapped for another run's", 1, 1, _plain(line, folder))


def _weights(place: Path, *, seed: int) -> list[Path]:
    """The weights of the teachers with this seed."""
    records = {file.stem: read_record(file) for file in place.glob("results/runs/teacher/*.json")}
    return [place / "outputs/runs/teacher" / name / "weights.pt" for name, record in records.items() if record["seed"] == seed]


# --- all of it --------------------------------------------------------------------------------------------

DAMAGES: list[tuple[str, str, str, bool]] = [
    ("checkpoint", "outputs/runs/jacobian_distill/*/last.ckpt", "is set aside", False),
    ("teacher's weights", "outputs/runs/teacher/*/weights.pt", "same numbers as its record", False),
    ("cache of teacher targets", "outputs/cache/targets/*/gradient-label", "is damaged", False),
    ("record of a teacher", "results/runs/teacher/*.json", "can't be read", True),
]


def trials(count: int, seed: int) -> Iterator[tuple[str, Callable[[Path], Trial]]]:
    """(name, trial) of every trial; count: of kills in all."""
    chance = random.Random(seed)
    for name in EXPERIMENTS:
        yield f"kills {name}", partial(kills, name, max(1, count // 4), chance=chance)
    yield "kills record", partial(kills_while_recording, max(1, count // 10), chance=chance)
    for size in (2, 8):
        yield f"crowd of {size}", partial(crowd, size)
    for room in ("40k", "600k"):
        yield f"full disk {room}", partial(full_disk, room)
    yield "read-only", read_only
    yield "clock", jumping_clock
    for what, pattern, message, stops in DAMAGES:
        yield f"damaged {what}", partial(damaged, what, pattern, message, stops=stops)
    yield "damaged parquet", damaged_parquet
    for who in STOPPING:
        yield f"signal to {who}", partial(signalled, who)
    yield "two outputs", two_outputs
    yield "hostile configs", hostile
    yield "edited record", edited_record
    yield "swapped weights", swapped_weights


def attempt(name: str, trial: Callable[[Path], Trial]) -> Trial:
    """The trial in a folder of its own, which stays where it went wrong."""
    folder = Path(tempfile.mkdtemp(prefix="gradexp-reliability-"))
    begun = time.monotonic()
    try:
        done = trial(folder)
    except PermissionError:
        done = Trial(name, 0, 0, "not tried: mounting a small file system needs root")
    except WrongError as wrong:
        done = Trial(name, 1, 0, f"WRONG: {wrong}")
    if done.good == done.times:
        subprocess.run(["rm", "-rf", str(folder)], check=True)
    print(f"{time.monotonic() - begun:.0f} s  {done.good}/{done.times}  {done.what}: {done.message}", flush=True)
    return done


NOTES = """## A signal in the middle

SIGTERM, SIGUSR1, SIGUSR2 (SLURM's) and Ctrl-C, to `run.py` or to one of the processes that train together:

| when it comes | exit code | what is left, and what the same command does next |
|---|---|---|
| while Python imports, or before the first step | the signal's | what was there, and finished chunks of targets |
| in a training | 143; Ctrl-C: SIGINT's | `last.ckpt` in the run's folder, written after the step; it resumes |
| in an evaluation of a trained model | the signal's, at once | finished pieces in the run's folder; it does the others |
| after the last step | the signal's | the record, or none; it answers, or resumes from the last regular checkpoint |

The run's folder is `outputs/runs/NAME/ID`. Processes that train together have 30 s after a signal; one whose step takes longer
is killed, and the last regular checkpoint is what remains. A table's command (`make table-2.1`) passes the signal on to its
runs, waits for their checkpoints, and ends with the same code. (By SIGKILL it passes
nothing on: its runs of that moment go on and write their records.)

## Checked by `make verify`

Every record and the files of its run on this disk; a sample of quick records, repeated; and the runs of `results/verify`, which
are kept to be repeated: a changed term, gradient, saliency method or score that nobody meant to change is a finding. After an
intended change, delete them and type the `command` of each again with `paths.results=results/verify`.

## What is trusted

Trusted: the checkout, with its code and `conf/`; the data root, whose images and labels are checked for their form and get
fingerprints in records, but are not compared with the published ones; what the user names on the command line, including
Hydra's own options and plugins, packages in `GRADEXP_PLUGINS` and the folders of `paths`; the other users of a results
folder.

Not trusted, as they come from other people: records, configs and experiments, pictures, weights.

- A record is data. The classes that its config names are built only if they are listed for their place
  (`gradexp/engine/build.py`). Every reader of a record checks its form, that its id is that of its config, and its digest.
- Configs can choose among the listed classes and set their declared parameters; they can also read environment variables, whose
  values are then in the record. They cannot name other code, configure Hydra (its settings are compared with those of
  `conf/config.yaml` before it starts) or choose a folder.
- Weights, checkpoints and pieces are loaded without executing what they hold (`weights_only=True`), and their checksums are
  compared. A checksum recognises damage; it does not prove who wrote a file.
- The digest of a record recognises damage and edits; it does not prove who wrote it. All committed records have one. Those from
  before 2026-11-29 got it on 2026-11-30 and are as they were then. In other folders, a record of that age without a digest is
  read, and its edits are not noticed. Files of long curves from before 2026-11-29 have none.
- Pictures are decoded by Pillow; one that cannot be read is an error of one line.
"""


def page(done: Sequence[Trial]) -> str:
    rows = [(trial.what, f"{trial.good}/{trial.times}", trial.message) for trial in done]
    return "\n".join(
        [
            "# Faults, tried",
            "",
            "Written by `python scripts/reliability.py`, which tries each of these on narrow networks and scikit-learn's",
            "digits. A trial is good when nothing wrong was written, the user read a one-line message with a fix, and the next",
            "attempt left the records, weights and maps of an undisturbed run, bit for bit (times and speeds aside). Commit "
            f"`{str(git_state()['commit'])[:12]}`.",
            "",
            *table_lines(("what was done", "good", "what the user reads, or finds"), rows),
            "",
            NOTES,
        ]
    )


# --- a soak -------------------------------------------------------------------------------------------------

# Exit codes; a signal that comes while Python imports what the command needs ends it as it ends any process.
ENDS = {
    "SIGKILL": (-9,),
    "SIGTERM": (143, -15),
    "SIGINT": (-2,),
    "SIGUSR2": (143, -12),
    "SIGTERM to a training process": (143, -15),
    "SIGSTOP": (),  # and SIGCONT, a while later
}
FAULTS = ("none", *ENDS, "damage", "swap", "full disk")
DISK = 32  # MiB of each clone's outputs
Sweep = Sequence[tuple[str, ...]]  # its commands, each as overrides


class Clone:
    """A copy of the code with outputs of its own on a small disk, which shares the results folder."""

    def __init__(self, folder: Path, name: str, seed: str) -> None:
        self.root, self.outputs, self.results = folder / name, folder / f"outputs-{name}", folder / "results"
        self.chance, self.faults = random.Random(f"{seed} {name}"), Counter[str]()
        self.tampered: dict[Path, str] = {}  # files that were changed, and what they were after that
        for part in ("gradexp", "conf"):
            shutil.copytree(ROOT / part, self.root / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "run.py", self.root)

    def insist(self, words: Sequence[str]) -> None:
        """Types a command until it ends well, each time with a fault. Raises WrongError for an end that no fault explains."""
        while not self.attempt(words, self.chance.choice(FAULTS)):
            pass

    def attempt(self, words: Sequence[str], fault: str) -> bool:
        filler = self.outputs / "filler"
        if fault in ("damage", "swap"):
            fault = self.tamper(fault)
        elif fault == "full disk":
            with suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(2**16))
        process = command(self.outputs.parent, words, root=self.root, outputs=self.outputs)
        ended = threading.Event()
        timer = threading.Thread(target=self.signal, args=(process, fault, ended))
        timer.start()
        output, _ = process.communicate()
        ended.set()
        timer.join()
        filler.unlink(missing_ok=True)
        self.faults[fault] += 1
        code = process.returncode
        expect("Traceback" not in output or (code == -2 and "in <module>" in output), f"{fault}: {output}")
        expect(code in (0, *ENDS.get(fault, (1,))), f"{fault}: exit code {code}: {output}")
        if code == 1:
            line = output.splitlines()[-1]
            expect(line.startswith("error: ") and (fault == "full disk" or "delete" in line), f"{fault}: {output}")
            if fault != "full disk":  # what the line says
                shutil.rmtree(self.outputs / "runs")
        return code == 0

    def signal(self, process: "subprocess.Popen[str]", fault: str, ended: threading.Event) -> None:
        if fault not in ENDS or ended.wait(self.chance.uniform(0, 12)):
            return
        ranks = training_processes(process.pid)
        target = self.chance.choice(ranks) if "training process" in fault and ranks else process.pid
        with suppress(ProcessLookupError):
            os.kill(target, getattr(signal, fault.split()[0]))
            if fault == "SIGSTOP":
                ended.wait(self.chance.uniform(0, 5))
                os.kill(target, signal.SIGCONT)

    def tamper(self, fault: str) -> str:
        """Changes or replaces a file of an earlier run. Returns the fault, or `none` where there is no such file."""
        files = [file for pattern in ("*/*/last.ckpt", "*/*/weights.pt") for file in self.outputs.glob(f"runs/{pattern}")]
        if fault == "damage" and files:
            damage(target := self.chance.choice(files))
            self.tampered[target] = sha256(target)
            return fault
        twins = [(a, b) for a in files for b in files if a != b and a.name == b.name]
        if fault == "swap" and twins:
            source, target = self.chance.choice(twins)
            for suffix in ("", ".sha256"):
                if (other := source.with_name(source.name + suffix)).exists():
                    shutil.copy(other, target.with_name(target.name + suffix))
            self.tampered[target] = sha256(target)
            return fault
        return "none"


def sweep(own: int) -> Sweep:
    """The commands of one clone. Two of three runs are wanted by both clones; of the others, own is the number of images."""
    methods = ("ce", "a", "ce_a", "a_j", "ce_a_j")
    commands = []
    for number in range(20):
        # The teacher that two processes train differs from that of one process in its last bits, and has its own seed.
        together = (*TOGETHER, "upstream.teacher.seed=1") if number % 4 == 3 else ()
        images = 7 if number % 3 else own
        words = (f"method={methods[number % 5]}", f"seed={number // 5}", f"data.per_class={images}")
        commands.append((*EXPERIMENTS["teacher targets"], "optim.passes=10", *together, *words))
    return commands


def soak(minutes: float, seed: int) -> Trial:
    """A sweep by two clones with one results folder, disturbed at random, again and again, against the undisturbed sweep."""
    folder = Path(tempfile.mkdtemp(prefix="gradexp-soak-"))
    sweeps = [sweep(own) for own in (8, 9)]
    for words in dict.fromkeys(itertools.chain(*sweeps)):
        process = command(folder / "calm", words)
        output, _ = process.communicate()
        expect(process.returncode == 0, output)
    calm, end, faults, records = left(folder / "calm"), time.monotonic() + 60 * minutes, Counter[str](), 0
    for number in itertools.count():
        if time.monotonic() > end:
            break
        stormy, new = storm(folder / str(number), sweeps, f"{seed} {number}", end)
        expect(stormy.items() <= calm.items(), f"not what the undisturbed sweep left; see {folder / str(number)}")
        faults, records = faults + new, records + sum("/" not in name for name in stormy)
        shutil.rmtree(folder / str(number))
        print(f"{records} records so far, {faults.total()} commands", flush=True)
    shutil.rmtree(folder)
    counts = ", ".join(f"{count} {fault}" for fault, count in sorted(faults.items()) if fault != "none")
    return Trial(f"{minutes:g} minutes of sweeps by two clones", records, records, f"{counts}; equal to the bit")


def storm(
    folder: Path, sweeps: Sequence[Sequence[tuple[str, ...]]], seed: str, end: float
) -> tuple[dict[str, Any], Counter[str]]:
    """A disturbed sweep by each of two clones, until `end`: the records and weights that it left, and its faults."""
    clones = [Clone(folder, name, seed) for name in ("first", "second")]

    def disturbed(clone: Clone, commands: Sweep) -> None:
        for words in commands:
            if time.monotonic() < end:
                clone.insist(words)

    with ExitStack() as disks, ThreadPoolExecutor(2) as pool:
        for clone in clones:
            disks.enter_context(mounted(clone.outputs, f"size={DISK}m"))
        list(pool.map(disturbed, clones, sweeps))
        weights = {
            f"{file.parent.name}/{file.name}": digest
            for clone in clones
            for file in clone.outputs.glob("runs/*/*/weights.pt")
            if clone.tampered.get(file) != (digest := sha256(file))  # a file changed after the last run that read it
        }
    return left(folder) | weights, clones[0].faults + clones[1].faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, help="how many; 30 for the page")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="two clones, disturbed at random")
    parser.add_argument("--only", help="trials whose name holds this")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.soak:
        chosen = [("soak", lambda _: soak(given.soak, given.seed))]
    else:
        chosen = [item for item in trials(given.kills or 30, given.seed) if not given.only or given.only in item[0]]
    done = [attempt(name, trial) for name, trial in chosen]
    if not (given.soak or given.kills or given.only):
        write_atomically(ROOT / "docs" / "reliability.md", page(done).encode())
        print("written: docs/reliability.md")
    if any(trial.good < trial.times for trial in done):
        sys.exit("error: something went wrong")


if __name__ == "__main__":
    main()
