"""Hand a model on: a stage of a run -> a Hugging Face folder that torch's GPT2LMHeadModel and `transformers serve` load.

Weights, config, tokenizer with the prompt as its chat template, one reply decoded as in the evaluation, the value head in a file of
its own, and a model card written from the run. The run itself is only read.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from therapy_jax import run
from therapy_jax.config import Config, ConfigError
from therapy_jax.run import console, escape


@dataclass(frozen=True)
class Options:
    stage: Literal["base", "sft", "ppo"] | None = None
    """Whose model is handed on; null = the run's last stage."""
    out: str | None = None
    """Folder to write; null = RUN_DIR/STAGE/export."""


def main(config: Config, options: Options) -> None:
    from therapy_jax import export, locate  # here: they import jax, and --help answers at once
    from therapy_jax.card import TAGS, read_record

    folder = Path(config.run_dir).expanduser()
    wanted = locate.STAGES if options.stage is None else (options.stage,)
    stage = next((name for name in wanted if (folder / name / "model" / "model.safetensors").is_file()), None)
    if stage is None:
        what = options.stage or "trained"
        held = f"it holds {locate.holds(folder)}" if folder.is_dir() else "there is no such folder"
        raise ConfigError(
            f"{folder}: no {what} model here ({held}); run scripts/train_sft.py and train_ppo.py with this --run_dir first"
        )
    record = read_record(folder, config, stage)
    out = Path(options.out).expanduser() if options.out else folder / stage / "export"
    card = out / "README.md"
    ours = card.is_file() and TAGS in card.read_text(encoding="utf-8", errors="replace")
    if out.exists() and not ours and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out}: exists and is no export of ours; choose an empty or new folder")
    try:
        export.write(out, folder, stage, record)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written ({error.strerror}); choose another folder") from error
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    console.print(f"{stage} of {escape(str(folder))}: {size / 1e6:,.1f} MB in {escape(str(out))}")
    if stage not in record.results.get("systems", {}):
        console.print("[yellow]not evaluated yet[/]: the card says so; run scripts/evaluate.py, then this again")


if __name__ == "__main__":
    run.main(main, __doc__, Options)
