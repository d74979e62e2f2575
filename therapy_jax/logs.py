"""What a run writes down of itself, and how it takes it up again: one object a line, one line a logged step.

    metrics.jsonl      stage, step, seconds and every metric; unique by stage and step, whatever was killed when
    samples.jsonl      the same prompts answered again and again while PPO goes on
    environment.json   per stage: commit, versions, devices, when and how long
    tensorboard/       metrics.jsonl as events, where the config says `tensorboard: true`

A log in object storage cannot be appended to: it grows in a local copy, which each save puts where it belongs.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from therapy_jax.config import ConfigError
from therapy_jax.dialogue import Exchange
from therapy_jax.files import is_remote, write_json, write_text

LOGS = ("metrics.jsonl", "samples.jsonl")
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "nltk", "rouge-score")


def log(folder: Path, stage: str, step: int, metrics: Mapping[str, Any], started: float) -> None:
    """One line of metrics.jsonl. `started`: time.monotonic() at the start of the stage."""
    line = {
        "stage": stage,
        "step": step,
        "seconds": round(time.monotonic() - started, 2),
        **{k: plain(v) for k, v in metrics.items()},
    }
    append(folder / "metrics.jsonl", [line])
    if (events := _events.get(str(folder))) is not None:
        for name, value in line.items():
            if isinstance(value, (int, float)) and name != "step":
                events.add_scalar(f"{stage}/{name}", value, step)


_events: dict[str, Any] = {}  # run folders that are also written for TensorBoard -> their writers


def open_events(folder: Path) -> None:
    """Also write what `log` is given to folder/tensorboard. Raises ConfigError where the extra is missing."""
    from therapy_jax import processes

    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "tensorboard: true needs tensorboardX, which is not installed: pip install 'therapy_jax[tensorboard]'"
        ) from error
    if processes.is_writer() and str(folder) not in _events:
        writer = _events[str(folder)] = SummaryWriter(str(folder / "tensorboard"), flush_secs=5)
        atexit.register(writer.close)


def log_samples(
    folder: Path, step: int, texts: Sequence[str], emotions: Sequence[str | None], exchanges: Sequence[Exchange]
) -> None:
    """Append the replies of one evaluation to samples.jsonl."""
    append(
        folder / "samples.jsonl",
        [
            {"stage": "ppo", "step": step, "client": exchange.client.text, "reply": text, "emotion": emotion,
             "therapist": exchange.therapist.text}
            for text, emotion, exchange in zip(texts, emotions, exchanges, strict=True)
        ],
    )  # fmt: skip


def append(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Records -> lines at the end of a log. The other processes write none; a remote log grows in a local copy."""
    from therapy_jax import processes

    if processes.is_writer():
        with local_copy(path).open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def local_copy(path: Path) -> Path:
    """Where lines are appended: the log itself, or for a remote one a file of this process."""
    if not is_remote(path):
        return path
    return local_logs() / urllib.parse.quote(str(path), safe="")


@functools.cache
def local_logs() -> Path:
    folder = tempfile.mkdtemp(prefix="therapy_jax_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def copy_logs(folder: Path) -> None:
    """Put the local copies of a remote folder's logs where they belong: before each save, and at the end."""
    for name in LOGS if is_remote(folder) else ():
        if (source := local_copy(folder / name)).is_file():
            (folder / name).write_text(source.read_text(encoding="utf-8"))


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; one that a kill or a full disk has cut, be it within a letter, is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records


def take_up(folder: Path, stage: str, step: int, name: str = "metrics.jsonl") -> dict[int, dict[str, Any]]:
    """Drop this stage's lines beyond `step`, which were written after the checkpoint that a restart goes on from -> those
    that stay, by step. Every process must call this."""
    from therapy_jax import processes

    mine: dict[int, dict[str, Any]] = {}
    if processes.is_writer():
        found = read_log(folder / name)
        kept = [record for record in found if record["stage"] != stage or record["step"] <= step]
        mine = {record["step"]: record for record in kept if record["stage"] == stage}
        if (folder / name).is_file():
            write_text(local_copy(folder / name), "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept))
    return {int(at): record for at, record in processes.shared(mine).items()}


def plain(value: Any) -> Any:
    """A scalar array -> a Python number of six digits; anything else as it is."""
    return float(f"{float(value):.6g}") if hasattr(value, "dtype") or isinstance(value, float) else value


def is_noted(folder: Path, stage: str) -> bool:
    """Whether environment.json knows of the stage; one that was killed between its last checkpoint and its end is not in it."""
    path = folder / "environment.json"
    return path.is_file() and stage in json.loads(path.read_text(encoding="utf-8"))


@contextlib.contextmanager
def noting(folder: Path, stage: str, began: float) -> Iterator[None]:
    """Within: a signal or a refusal that ends the stage early leaves its seconds (since `began`) in environment.json."""
    from therapy_jax.stopping import Stopped

    try:
        yield
    except (Stopped, ConfigError):
        with contextlib.suppress(OSError):  # it may have been a full disk
            note_environment(folder, stage, time.monotonic() - began)
        raise


def note_environment(folder: Path, stage: str, seconds: float, went_on: bool = True) -> None:
    """Add to environment.json what a table in a README must name beside its figures. went_on: a stage that was stopped and went on
    counts all its time; one that begins anew each time, its own alone."""
    import jax

    from therapy_jax import processes

    if not processes.is_writer():
        return
    path = folder / "environment.json"
    stages = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    before = stages.get(stage, {}).get("seconds", 0.0) if went_on else 0.0
    stages[stage] = {
        "commit": commit(),
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(before + seconds, 1),
        "devices": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }
    write_json(path, stages)


@functools.cache  # asked for at the start: the checkout may move on while a long run goes on with what it loaded
def commit() -> str | None:
    """The commit of the code that runs, "+" where it has uncommitted changes; None outside git."""
    here = Path(__file__).parent
    scripts = here.parent / "scripts"
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        )
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "-uno", "--", here, scripts],
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")
