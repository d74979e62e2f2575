"""What one stage leaves for the next: models in the run folder, and what is made from them to score replies and to judge
whether they are language."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from therapy_jax import classifiers, evaluate, gpt2, origin, prompts, run, sharding, weights
from therapy_jax import config as config_module
from therapy_jax.config import Config, ConfigError
from therapy_jax.dialogue import Dialogue, Exchange
from therapy_jax.files import as_path, fetched
from therapy_jax.rewards import combine, scoring
from therapy_jax.rewards.batch import Fixed
from therapy_jax.rewards.words import make_vocabulary


def model_of(folder: Path, stage: str) -> Path:
    """Where an earlier stage left its model. Raises ConfigError where it did not."""
    path = folder / stage / "model"
    if not (path / "model.safetensors").is_file():
        script = "train_ppo.py" if stage == "ppo" else "train_sft.py"
        raise ConfigError(
            f"{path}: no {stage} model here; run scripts/{script} with the same --config and --run_dir first"
        )
    return path


def load_model(folder: Path, stage: str, config: Config) -> tuple[Any, Any, Any]:
    """The model that an earlier stage left in the run folder -> (GPT2Config, params, tokenizer)."""
    path = fetched(model_of(folder, stage))
    gpt2_config, params = weights.load_pretrained(path)
    mesh = sharding.make_mesh(config.mesh)
    how = {"compute_dtype": run.compute_dtype(config), "remat": config.model.remat, "mesh": mesh}
    gpt2_config = dataclasses.replace(gpt2_config, **how)
    sharding.check_model(mesh, gpt2_config.split_sizes)
    return gpt2_config, params, prompts.load_tokenizer(path)


def make_scorer(
    folder: Path, config: Config, data: dict[str, list[Exchange]], gpt2_config: Any, params: Any, tokenizer: Any
) -> evaluate.Scorer:
    """What gives replies their reward terms (evaluate.Scorer): the SFT model as trunk, the classifiers of the run folder
    (trained now where there are none yet), and the rewards that the config names."""
    device_custom, host = scoring.load(config.rewards)
    mesh = sharding.make_mesh(config.mesh)
    trunk = sharding.place(mesh, params)  # once on the devices, and not again at each reading
    names = classifiers.REWARDING
    frozen = classifiers.load_or_train(folder, config, data, gpt2_config, trunk, tokenizer, names).frozen
    fixed = sharding.replicate(mesh, Fixed(make_vocabulary(tokenizer, gpt2_config.padded_vocab_size), frozen))
    wanted = combine.weights_of(config.rewards)
    return evaluate.Scorer(trunk, gpt2.GPT2(gpt2_config), tokenizer, fixed, wanted, device_custom, host)


def load_language_model(config: Config, held_out: Sequence[Dialogue], split: str) -> evaluate.LanguageModel | None:
    """The model that says whether replies are language (evaluate.LanguageModel), or None where the config names none. It
    must come from another seed than this run: what a policy was trained with would only praise itself. And it must not have
    learnt from the conversations that it judges (ConfigError): of data that each seed splits anew, name the splits in a file."""
    if config.evaluate.language_model is None:
        return None
    folder = as_path(config.evaluate.language_model)
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"evaluate.language_model: {folder} is no run folder (it has no config.yaml)")
    theirs, noted = config_module.load(fetched(folder) / "config.yaml"), origin.read(model_of(folder, "sft"))
    seed, prompt = (noted["seed"], origin.prompt_of(noted)) if noted else (theirs.seed, theirs.prompt)
    origin.check_unseen(model_of(folder, "sft"), config, held_out, split)
    if seed == config.seed:
        raise ConfigError(
            f"evaluate.language_model: {folder} has this run's own seed ({config.seed}); use another seed's"
        )
    gpt2_config, params, tokenizer = load_model(folder, "sft", config)
    params = sharding.place(sharding.make_mesh(config.mesh), params)
    return evaluate.LanguageModel(params, gpt2.GPT2(gpt2_config), tokenizer, prompt)
