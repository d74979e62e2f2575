"""Checkpoints through orbax: the whole state of a stage, and what it belongs to.

A step number is a place in the data and in the random stream (both derive from seed and step), so state + step is all that
going on needs. A step is saved before it is evaluated, with what its log line says so far (`line`): an evaluation that is
cut short is made again by the next start, and the log has neither a gap nor a line twice. How good a step was found to be
therefore stands in the log, not here.

A save is whole or it is not there: orbax writes to a temporary folder and renames it, and then a manifest of sizes and
checksums is put inside, by rename too. A step without one was cut off between the two; like one whose files are not what
the manifest says, it is put aside and the step before it is used.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath

from therapy_jax import processes
from therapy_jax.files import flatten, is_remote, write_json

FORMAT = 3  # of what we write; raised when an older checkpoint can no longer be read
MANIFEST = "manifest.json"


class CheckpointError(ValueError):
    """A checkpoint that does not belong to this run, or cannot be written; the message names what differs or is wrong."""


class Restored(NamedTuple):
    state: Any
    step: int
    line: dict[str, Any] | None  # what was to be logged for this step; None where nothing was


class NewestAndBest(NamedTuple):
    """Which steps orbax keeps: the newest `newest`, and the best by `scores`, which the training loop goes on filling."""

    newest: int
    mode: str
    scores: Mapping[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*sorted(steps)[-self.newest :], best(steps, self.scores, self.mode)}
        return [step in kept for step in steps]


def best(steps: Sequence[int], scores: Mapping[int, float], mode: str) -> int:
    """The step with the lowest ("min") or highest ("max") score; the newest of equals, and where none has a score."""
    return max(steps, key=ranking(scores, mode))


def ranking(scores: Mapping[int, float], mode: str) -> Callable[[int], tuple[float, int]]:
    """A key to sort steps by: the best last. A score that is missing or NaN is worse than any."""

    def rank(step: int) -> tuple[float, int]:
        score = scores.get(step, math.nan) * (-1 if mode == "min" else 1)
        return (-math.inf if math.isnan(score) else score, step)

    return rank


def manager(folder: str | os.PathLike, mode: str, scores: Mapping[int, float], keep: int = 2) -> ocp.CheckpointManager:
    """Opens (or makes) a folder of checkpoints; the newest `keep` stay, and beside them the best by `scores`."""
    options = ocp.CheckpointManagerOptions(
        preservation_policy=NewestAndBest(keep, mode, scores),
        cleanup_tmp_directories=True,
        enable_async_checkpointing=False,
    )
    path = epath.Path(folder)
    try:
        return ocp.CheckpointManager(path if is_remote(path) else path.absolute(), options=options)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written ({error.strerror or error})") from error


def save(
    manager: ocp.CheckpointManager,
    step: int,
    state: Any,
    belongs_to: Mapping[str, Any],
    line: Mapping[str, Any] | None = None,
) -> None:
    """Write `state` as step `step`; a step that exists already (the same state, after a restart) is left alone. Every
    process must call this. Raises CheckpointError where it cannot be written; the steps before stay as they are. The loss of
    another process is raised as it comes."""
    if processes.shared(step in manager.all_steps()):
        return
    info = {"format": FORMAT, "belongs_to": dict(belongs_to), "line": None if line is None else dict(line)}
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), info=ocp.args.JsonSave(info))
    try:
        saved = manager.save(step, args=args, force=True)
        manager.wait_until_finished()
        if processes.is_writer():
            folder = manager.directory / str(step)
            write_json(folder / MANIFEST, measure(folder))
    except (OSError, ValueError, RuntimeError) as error:  # tensorstore says a full disk in any of these
        if processes.is_loss_of_another(error):
            raise
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise CheckpointError(
            f"{manager.directory}: step {step} could not be saved ({reason}); the checkpoints before it are whole: "
            "make room, and the same command goes on from there"
        ) from error
    if not saved:
        raise CheckpointError(f"{manager.directory}: step {step} was not saved")
    processes.wait_for_all(f"saved {step}")


def restore(
    manager: ocp.CheckpointManager,
    state: Any,
    belongs_to: Mapping[str, Any],
    rank: Callable[[int], Any] = int,
    say: Callable[[str], object] = print,
) -> Restored | None:
    """The newest checkpoint that is whole (or the first by another `rank`, such as `ranking`), or None where there is none.
    Damaged ones are put aside as damaged-STEP, and named by `say`. Every process must call this.

    `state` gives the structure, shapes, dtypes and shardings to restore into: other devices, in another number, will do.
    Raises CheckpointError where the checkpoint was written by another format version, or belongs to another model, data or
    seed; and where a process does not see the folder.
    """
    while steps := processes.shared(sorted(manager.all_steps())):
        step = max(steps, key=rank)
        folder = manager.directory / str(step)
        if processes.in_any(not folder.exists()):
            raise CheckpointError(
                f"{folder}: not every process sees this folder of process 0; choose a run_dir that all hosts share"
            )
        fault = processes.shared(damage(folder) if processes.is_writer() else None)
        if fault is None:
            break
        aside = manager.directory / f"damaged-{step}"
        say(f"{folder}: {fault}; put aside as {aside.name}, the checkpoint before it is used")
        if processes.is_writer():
            if aside.exists():
                aside.rmtree()
            folder.rename(aside)
        processes.wait_for_all(f"put aside {step}")
        manager.reload()
    else:
        return None
    info = manager.restore(step, args=ocp.args.Composite(info=ocp.args.JsonRestore()))["info"]
    if info["format"] != FORMAT:
        raise CheckpointError(
            f"{manager.directory}: written in format {info['format']}, this is format {FORMAT}; start in a new run_dir"
        )
    then, now = flatten(info["belongs_to"]), flatten(belongs_to)
    keys = [key for key in sorted(then | now) if then.get(key) != now.get(key)]
    differing = [f"{key} was {then.get(key)!r}, now {now.get(key)!r}" for key in keys]
    if differing:
        raise CheckpointError(
            f"{manager.directory}: step {step} belongs to another run ({'; '.join(differing[:5])}); "
            "set these back, or start in a new run_dir"
        )
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    restored = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))
    return Restored(restored["state"], step, info["line"])


# ------------------------------------------------------------------------------------------------------------ manifests


def measure(folder: epath.Path) -> dict[str, list[int]]:
    """Each file below -> [bytes, CRC-32]. Object stores check what they hold themselves: there sizes alone are taken, and
    nothing is read back."""
    found: dict[str, list[int]] = {}
    for parent, _, names in folder.walk():
        for name in names:
            path = parent / name
            if path == folder / MANIFEST or name.endswith(".partial"):
                continue
            relative = path.relative_to(folder).as_posix()
            found[relative] = [path.stat().length] if is_remote(path) else [path.stat().length, checksum(path)]
    return dict(sorted(found.items()))


def checksum(path: epath.Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


def damage(folder: epath.Path) -> str | None:
    """What is wrong with a saved step, in words; None where it is as it was written."""
    try:
        written: dict[str, list[int]] = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return None if format_of(folder) not in (None, FORMAT) else "was cut off while it was being saved"
    except (OSError, ValueError):
        return f"{MANIFEST} is damaged"
    found = measure(folder)
    for name, was in written.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != was:
            return f"{name} is damaged"
    return None


def format_of(folder: epath.Path) -> int | None:
    """In which format a step without a manifest was written: those before 2 had none, and are refused by their number."""
    try:
        return json.loads((folder / "info" / "metadata").read_text())["format"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
