"""An experiment of many cells: one config -> a config for each.

grid.sft and grid.ppo of the config name the cells; each is the config with a few settings changed. Every SFT cell starts
from one shared pre-training, every PPO cell from an SFT cell of the same seed:

    run_dir/pretrained/base/model        the model that all SFT cells start from
            language_model/sft/model     trained from another seed: the judge of whether replies are language
            seedK/CELL/                  one run folder a cell; seed K is config.seed + K
            results.json table.md curves.png

Pure but for a temporary file. scripts/reproduce.py trains the cells; grid_results.py makes the last line of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from therapy_jax import config as config_module
from therapy_jax.config import Config, ConfigError, GridConfig
from therapy_jax.files import flatten

TRIVIAL = ("base", "constant", "retrieval", "random")  # answered once, in the first SFT cell of the first seed
LANGUAGE_MODEL_SEED = 1000  # added to config.seed: no cell has it
FREE = ("model.dropout", "model.compute_dtype")
SHARED = ("run_dir", "seed", "data", "model", "tokenizer", "pretrain", "grid", "mesh", "compilation_cache")
SAME_ANSWERS = tuple(f"evaluate.{name}" for name in ("systems", "split", "limit", "language_model", "bootstrap"))


class Cell(NamedTuple):
    name: str
    number: int  # K of seedK, from 0
    source: str | None  # the SFT cell that a PPO cell starts from; None for an SFT cell
    config: Config

    @property
    def folder(self) -> Path:
        return Path(self.config.run_dir).expanduser()

    @property
    def system(self) -> str:
        """The name of the trained system in its results.json and answers.json."""
        return "ppo" if self.source else "sft"


def override(config: Config, overrides: Mapping[str, Any], name: str) -> Config:
    """The config with {dotted key: value} changed, read by the one parser, and no grid of its own.

    Raises ConfigError, beginning with `name`, for a key that does not exist, a wrong type, or settings at odds.
    """
    tree = dataclasses.asdict(dataclasses.replace(config, grid=GridConfig()))
    for key, value in flatten(overrides).items():
        *path, last = key.split(".")
        node = tree
        for part in path:
            node[part] = node[part] if isinstance(node.get(part), dict) else {}
            node = node[part]
        node[last] = value
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(config_module.dump_yaml(tree))
        file.flush()
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                return config_module.parse(["--config", file.name])
        except SystemExit:
            raise ConfigError(f"{name}: {' '.join(said.getvalue().split('error: ')[-1].split())}") from None


def expand(config: Config, seeds: int) -> list[Cell]:
    """All cells in the order in which they are run: seed by seed, SFT before PPO. Raises ConfigError naming the cell."""
    root, first = config.run_dir, next(iter(config.grid.sft), None)
    if first is None:
        raise ConfigError("grid.sft names no cell; give it at least one, such as `grid: {sft: {context_emotion: {}}}`")
    for name in (*config.grid.sft, *config.grid.ppo):
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
            raise ConfigError(f"grid: {name!r} cannot name a folder; use letters, digits, '_', '-' and '.'")
    if twice := config.grid.sft.keys() & config.grid.ppo.keys():
        raise ConfigError(f"grid: {min(twice)} names an SFT cell and a PPO cell; rename one, they share a folder")
    start = {
        "model.name": f"{root}/pretrained/base/model",
        "tokenizer.name": None,
        "pretrain": None,
        "evaluate.language_model": config.evaluate.language_model or f"{root}/language_model",
    }
    sources, configs = dict.fromkeys(config.grid.sft), {}
    for name, changes in config.grid.sft.items():
        check_keys(changes, f"grid.sft.{name}", SHARED + SAME_ANSWERS)
        configs[name] = override(config, {**start, **changes, "evaluate.systems": ["sft"]}, f"grid.sft.{name}")
    for name, changes in config.grid.ppo.items():
        changes, where = dict(changes), f"grid.ppo.{name}"
        source = sources[name] = changes.pop("from", first)
        if source not in config.grid.sft:
            raise ConfigError(f"{where}.from: {source!r} is no SFT cell; choose from {', '.join(config.grid.sft)}")
        check_keys(changes, where, SHARED + SAME_ANSWERS + ("prompt", "sft", "classifiers"))
        configs[name] = override(configs[source], {**changes, "evaluate.systems": ["ppo"]}, where)
    cells = [
        Cell(name, k, sources[name], _placed(cell, f"{root}/seed{k}/{name}", config.seed + k))
        for k in range(seeds)
        for name, cell in configs.items()
    ]
    everything = dataclasses.replace(cells[0].config.evaluate, systems=["sft", *TRIVIAL])
    return [cells[0]._replace(config=dataclasses.replace(cells[0].config, evaluate=everything)), *cells[1:]]


def check_keys(changes: Mapping[str, Any], name: str, fixed: Sequence[str]) -> None:
    for key in flatten(changes):
        if key not in FREE and any(key == other or key.startswith(f"{other}.") for other in fixed):
            raise ConfigError(f"{name}: {key} is the same for all cells; set it outside the grid, or in the SFT cell")


def shared(config: Config) -> Config:
    """The config of the pre-training that all cells share."""
    return _placed(override(config, {}, "grid"), f"{config.run_dir}/pretrained", config.seed)


def language_model(config: Config) -> Config | None:
    """The config of the judge of language: the first SFT cell from another seed, pre-training included; None where
    evaluate.language_model names a run already."""
    if config.evaluate.language_model is not None:
        return None
    name, changes = next(iter(config.grid.sft.items()))
    judge = override(config, changes, f"grid.sft.{name}")
    return _placed(judge, f"{config.run_dir}/language_model", config.seed + LANGUAGE_MODEL_SEED)


def _placed(config: Config, folder: str, seed: int) -> Config:
    return dataclasses.replace(config, run_dir=folder, seed=seed)
