"""A whole experiment: every cell of the config's grid, for as many seeds as --seeds N says (default 1), then one table.

Each cell is a run folder as the other scripts make it. Stopped and started again, also by kill -9, the same command skips
what is finished and goes on with the rest; more seeds may be asked for later. results.json, table.md and curves.png in
run_dir hold what came out.
"""

from dataclasses import dataclass

from therapy_jax import run
from therapy_jax.config import require


@dataclass(frozen=True)
class Options:
    seeds: int = 1
    """Runs of every cell, from the config's seed on."""

    def __post_init__(self):
        require(self.seeds >= 1, f"--seeds must be at least 1, not {self.seeds}")


if __name__ == "__main__":
    run.parse(__doc__, Options)  # before jax is imported: --help and a misspelt key are answered at once

import os
from collections.abc import Callable
from pathlib import Path

import evaluate as evaluation  # scripts/evaluate.py
import train_ppo
import train_sft

from therapy_jax import config as config_module
from therapy_jax import files, grid, grid_results, report, sharding
from therapy_jax.config import Config, ConfigError
from therapy_jax.dialogue import Report, read_dialogues
from therapy_jax.run import console, escape


def main(config: Config, options: Options) -> None:
    require(
        not files.is_remote(config.run_dir) and config.mesh.coordinator is None,
        f"reproduce.py runs on one machine, in a local folder (run_dir {config.run_dir}, mesh.coordinator {config.mesh.coordinator})",
    )
    cells = grid.expand(config, options.seeds)
    judge = grid.language_model(config)
    check_split(config, {c.config.seed for c in cells} | ({judge.seed} if judge else set()))
    folder = run.start(config, "reproduce")

    finish(grid.shared(config), pretrain)
    if judge is not None:
        finish(judge, train_sft.main)
    for i, cell in enumerate(cells):
        console.rule(f"{escape(cell.name)}, seed {cell.config.seed} ({i + 1} of {len(cells)})", align="left")
        if cell.source:
            lend(cell.folder.parent / cell.source, cell.folder)
        finish(cell.config, train_ppo.main if cell.source else train_sft.main, evaluation.main)

    results = grid_results.summary(config, cells)
    files.write_json(folder / "results.json", results)
    (folder / "table.md").write_text(grid_results.markdown(results), encoding="utf-8")
    if config.grid.ppo:
        grid_results.curves(cells, folder / "curves.png")
        console.print(grid_results.screen(grid_results.comparison_rows(results, intervals=False)))
        console.print("* the 95 % interval of the difference (in table.md) leaves 0 out")
    console.print(grid_results.screen(grid_results.main_rows(results)))
    console.print(f"{results['hours']:.2f} h in all; written: {escape(str(folder))}/results.json, table.md, curves.png")
    report.finish(config)


def finish(config: Config, *stages: Callable[[Config], None]) -> None:
    """Run the stages of one folder, unless they were all finished with this very config."""
    folder, wanted = Path(config.run_dir).expanduser(), config_module.to_yaml(config)
    done = folder / "finished.yaml"
    if done.is_file() and done.read_text(encoding="utf-8") == wanted:
        console.print(f"finished before: {escape(str(folder))}")
        return
    done.unlink(missing_ok=True)  # other settings: what the stages write from here on is no longer what it vouched for
    for stage in stages:
        stage(config)
    report.finish(config, loupe=False)  # it would compile an iteration more for each cell; scripts/report.py makes it
    partial = done.with_suffix(".partial")
    partial.write_text(wanted, encoding="utf-8")
    os.replace(partial, done)


def pretrain(config: Config) -> None:
    """The model that all cells start from."""
    folder = run.start(config, "pretrain")
    dialogues = run.read_data(config.data, config.seed)
    train_sft.save_base(config, folder, dialogues, sharding.make_mesh(config.mesh))


def lend(source: Path, target: Path) -> None:
    """A PPO cell finds its SFT cell's model, and classifiers where there are any, in its own folder: by relative links, so
    that the whole experiment can be moved."""
    for name in ("sft/model", "classifiers"):
        link = target / name
        if (source / name).is_dir() and not link.exists():
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(source / name, link.parent), target_is_directory=True)


def check_split(config: Config, seeds: set[int]) -> None:
    """Raises ConfigError where each seed would split the conversations anew: seeds could not be compared, and the shared
    pre-training would have read another seed's test split."""
    data = config.data

    def split_of(seed: int) -> dict[str, list[str]]:
        parts = read_dialogues(data.path, data.format, data.splits, data.clean, data.on_bad_row, seed, Report())
        return {name: [d.conversation_id for d in part] for name, part in parts.items()}

    if any(split_of(seed) != split_of(config.seed) for seed in seeds - {config.seed}):
        raise ConfigError("data.splits: each seed would split these conversations anew; name a file of fixed splits")


if __name__ == "__main__":
    run.main(main, __doc__, Options)
