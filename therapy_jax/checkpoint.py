"""Checkpoints through orbax: the whole state of a stage, and what it belongs to.

A step number is a place in the data and in the random stream (both derive from seed and step), so state + step is all that
going on needs. The newest two checkpoints are kept, and beside them the best by one metric. Saves are atomic: orbax writes
to a temporary folder and renames it, so a run that is killed half-way leaves the checkpoint before.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from therapy_jax.files import flatten

FORMAT = 1  # of what we write; raised when an older checkpoint can no longer be read


class CheckpointError(ValueError):
    """A checkpoint that does not belong to this run; the message names what differs."""


def manager(folder: str | Path, best: str, mode: str, keep: int = 2) -> ocp.CheckpointManager:
    """Opens (or makes) a folder of checkpoints. `best` names the metric whose best step ("min" or "max") stays beside the
    newest `keep`; `manager.best_step()` says which it is.

    A preservation policy says both: with orbax's `best_fn` + `max_to_keep` alone the newest step may be deleted.
    """

    def metric(metrics: Mapping[str, float]) -> float:
        return metrics[best]

    newest_and_best = [LatestN(keep), BestN(get_metric_fn=metric, reverse=mode == "min", n=1)]
    options = ocp.CheckpointManagerOptions(
        best_fn=metric,
        best_mode=mode,
        preservation_policy=AnyPreservationPolicy(newest_and_best),
        cleanup_tmp_directories=True,
        enable_async_checkpointing=False,
    )
    return ocp.CheckpointManager(Path(folder).absolute(), options=options)


def save(
    manager: ocp.CheckpointManager, step: int, state: Any, belongs_to: Mapping[str, Any], metrics: Mapping[str, float]
) -> None:
    """Write `state` as step `step`. A step that exists already (the same state, after a restart) is left alone."""
    if step in manager.all_steps():
        return
    info = {"format": FORMAT, "belongs_to": dict(belongs_to)}
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), info=ocp.args.JsonSave(info))
    if not manager.save(step, args=args, metrics={k: float(v) for k, v in metrics.items()}, force=True):
        raise CheckpointError(f"{manager.directory}: step {step} was not saved")
    manager.wait_until_finished()


def restore(
    manager: ocp.CheckpointManager, state: Any, belongs_to: Mapping[str, Any], step: int | None = None
) -> tuple[Any, int] | None:
    """-> (state, step) of the newest checkpoint (or of `step`), or None where there is none.

    `state` gives the structure, shapes, dtypes and shardings to restore into. Raises CheckpointError where the checkpoint
    was written by another format version, or belongs to another model, data or seed.
    """
    step = manager.latest_step() if step is None else step
    if step is None:
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
    return restored["state"], step


def metric_of(manager: ocp.CheckpointManager, step: int, name: str) -> float:
    """A metric that was saved with a step."""
    metrics = manager.metrics(step)
    assert metrics is not None, f"step {step} has no metrics"
    return metrics[name]
