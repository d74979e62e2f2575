"""Where a model may come from: every script that takes one (model.name, tokenizer.name) takes any of

- `gpt2`: a hub id
- `FOLDER`: Hugging Face's layout, whoever wrote it: torch, a hub client, an export of ours
- `runs/NAME`, `runs/NAME/ppo`: a run folder (its last stage's model), or one stage of it
- `runs/NAME/ppo/checkpoints[/STEP]`: our checkpoints, the newest or this one, also while the run goes on
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

STAGES = ("ppo", "sft", "base")  # the last one first
ACCEPTED = (
    "a folder with config.json, model.safetensors and a tokenizer, a run folder (runs/NAME) or one of its stages "
    "(runs/NAME/ppo), or its checkpoints (runs/NAME/ppo/checkpoints[/STEP])"
)


class WeightsError(ValueError):
    """A model that cannot be had or used; the message says which and why."""


class Source(NamedTuple):
    """`folder` says what the model is (config.json, tokenizer) and holds its weights, unless they are a checkpoint's."""

    folder: Path
    checkpoint: Path | None = None


def find(name: str | os.PathLike) -> Source:
    """Any of the above -> Source. What is none of them comes back as a folder: its reader says what it misses."""
    folder = resolve(name)
    if not (folder / "config.json").is_file():
        for model in (folder / "model", *(folder / stage / "model" for stage in STAGES)):
            if (model / "model.safetensors").is_file():  # written last: the folder is whole
                return Source(model)
        steps = [int(step.name) for step in folder.iterdir() if step.name.isdecimal() and (step / "state").is_dir()]
        if steps:
            return of_checkpoint(folder / str(max(steps)))
        if (folder / "state").is_dir():
            return of_checkpoint(folder)
    return Source(folder)


def of_checkpoint(checkpoint: Path) -> Source:
    """A checkpoint knows its parameters alone; its stage's model folder, or that of a stage before, knows the rest."""
    stage = Path(os.path.abspath(checkpoint)).parent.parent
    if stage.name == "base":
        raise WeightsError(
            f"{checkpoint}: a checkpoint of pre-training has no rows for the prompt's markers yet; give {stage / 'model'}, "
            "which train_sft.py writes when pre-training is done"
        )
    for name in STAGES[STAGES.index(stage.name) :] if stage.name in STAGES else ():
        model = stage.parent / name / "model"
        if (model / "config.json").is_file():
            return Source(model, checkpoint)
    raise WeightsError(
        f"{checkpoint}: a checkpoint outside its run: its sizes and its tokenizer stand in the run's "
        "{base,sft,ppo}/model, and none is there; give it where the run left it (runs/NAME/ppo/checkpoints/STEP)"
    )


def read_checkpoint(checkpoint: Path) -> Any:
    """The parameters of a checkpoint (of PPO: the policy's), float32 on the host, and nothing else of its state. The folder
    is only read: a run may be writing into it. Raises WeightsError where it cannot be read."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    state: Any = checkpoint.absolute() / "state"  # Any: orbax wants a path type of its own, and takes this one
    try:
        reader = ocp.PyTreeCheckpointHandler()
        tree: Any = reader.metadata(state).tree
        wanted = {"params": {"policy": tree["params"]["policy"]} if "policy" in tree["params"] else tree["params"]}
        on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
        args = ocp.args.PyTreeRestore(item=wanted, restore_args=on_host, partial_restore=True)
        params = reader.restore(state, args=args)["params"]
    except Exception as error:  # orbax and tensorstore raise many kinds
        raise WeightsError(f"{checkpoint}: cannot be read ({str(error).splitlines()[0][:150]})") from error
    return params.get("policy", params)


def resolve(folder_or_hub_id: str | os.PathLike) -> Path:
    """A local folder as it is; a hub id through the hub's cache or the network (safetensors, config and tokenizer only)."""
    folder = Path(folder_or_hub_id).expanduser()
    if folder.is_dir():
        return folder
    name = str(folder_or_hub_id)
    if folder.exists():
        raise WeightsError(f"{name} is a file; give the folder that holds config.json and model.safetensors")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise WeightsError(f"{name}: no such folder")
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, allow_patterns=["*.json", "*.safetensors", "merges.txt", "vocab.txt"]
            )
        )
    except Exception as error:  # the hub's client raises many kinds, some of them requests' and httpx's own
        raise WeightsError(
            f"{name} is no local folder, and the hub could not give it ({type(error).__name__}); "
            "check the name and the network, or give a folder that holds config.json and model.safetensors"
        ) from error


def holds(folder: Path) -> str:
    """What a folder holds, for a message: a few names."""
    names = sorted(path.name for path in folder.iterdir())
    return (", ".join(names[:6]) + (", ..." if len(names) > 6 else "")) or "nothing"
