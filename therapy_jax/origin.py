"""What a model has been trained on and with, noted beside its weights: so that no held-out figure is that of a conversation
learnt by heart, and no prompt is one that the model has never seen.

Conversations are noted by a hash of id and words (16 hex digits, nothing of what was said): another seed, another file of
splits or another copy of the data is found out. The words are those after cleaning, so that one that another `data.clean` has
left otherwise passes for another; on MESC that hides a tenth of them, and the others tell.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from therapy_jax import processes
from therapy_jax.config import Config, ConfigError, PromptConfig, load, to_yaml
from therapy_jax.dialogue import Dialogue
from therapy_jax.files import as_path, write_json, write_text

NAME = "origin.json"
SETTINGS = "training.yaml"  # the run's own config.yaml is that of its last script, which may have had others


def digest(dialogue: Dialogue) -> str:
    said = "\n".join((dialogue.conversation_id, *(turn.text for turn in dialogue.turns)))
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def content(data: Any) -> str:
    """A digest of all that was read, so that a checkpoint does not go on with other data under the same path."""
    return hashlib.sha256(repr(data).encode()).hexdigest()[:16]


def note(model: Path, config: Config, learnt: Iterable[Dialogue], before: Path | None = None) -> None:
    """model/origin.json: seed, prompt, the clients' emotions in `learnt`, and which conversations it has learnt from, those of the
    model in the folder `before` among them; model/training.yaml: all settings. Before the weights are written."""
    if processes.is_writer():
        known = read(before) if before is not None else None
        as_path(model).mkdir(parents=True, exist_ok=True)
        inherited = known["conversations"] if known else []
        learnt = list(learnt)
        conversations = sorted({*inherited, *(digest(dialogue) for dialogue in learnt)})
        felt = {turn.emotion for dialogue in learnt for turn in dialogue.turns if turn.speaker == "client"} - {None}
        told = {"seed": config.seed, "prompt": dataclasses.asdict(config.prompt), "emotions": sorted(map(str, felt))}
        write_json(model / NAME, {**told, "conversations": conversations})
        write_text(model / SETTINGS, to_yaml(config))


def settings(model: Path) -> Config | None:
    """Those that it was trained with; None for a model that came without. Raises ConfigError where the file is damaged."""
    path = model / SETTINGS
    return load(path) if path.is_file() else None


def read(model: Path) -> dict[str, Any] | None:
    """None for a model that came without. Raises ConfigError where the file is damaged."""
    path = model / NAME
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {name: found[name] for name in ("seed", "prompt", "emotions", "conversations")}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: damaged ({error}); train the model again, or delete this file") from error


def prompt_of(found: dict[str, Any]) -> PromptConfig:
    return PromptConfig(**found["prompt"])


def check(model: Path, config: Config, held_out: Iterable[Dialogue], split: str) -> None:
    """Raises ConfigError where the model was trained with other prompts, or has learnt from conversations of this split."""
    if (found := read(model)) is None:
        return
    now = dataclasses.asdict(config.prompt)
    if differing := [f"prompt.{k} was {v}, now {now.get(k)}" for k, v in found["prompt"].items() if v != now.get(k)]:
        raise ConfigError(f"{model} was trained with other prompts ({', '.join(differing)}); give the same config")
    check_unseen(model, config, held_out, split)


def check_unseen(model: Path, config: Config, held_out: Iterable[Dialogue], split: str) -> None:
    """The second half of `check`, for a model that judges with prompts of its own."""
    if (found := read(model)) is None:
        return
    asked = [digest(dialogue) for dialogue in held_out]
    if learnt := len(set(asked) & set(found["conversations"])):
        raise ConfigError(
            f"{learnt} of the {len(asked)} conversations of the {split} split were in the training data of {model}: what is "
            f"measured on them is memory. It was trained with seed {found['seed']}, this is seed {config.seed}; give the same "
            "config, or name the splits in a file (data.splits)"
        )
