"""The report of a run folder: report.html, one file without network, and figures/*.png, from whatever the folder holds.

Every script that trains or evaluates ends by writing it; this writes it anew: `python scripts/report.py --run_dir runs/mine`.
All settings but run_dir are those of the run itself (its config.yaml); only a custom reward has to be given again.
"""

import dataclasses

from therapy_jax import config as config_module
from therapy_jax import files, run
from therapy_jax.config import Config, ConfigError


def main(config: Config) -> None:
    from therapy_jax import report

    folder = files.as_path(config.run_dir)
    if not folder.is_dir():
        raise ConfigError(f"run_dir {folder}: there is no such folder; name one that a script has made")
    if (folder / "config.yaml").is_file():
        own = config_module.load(folder / "config.yaml")
        # To look at a folder runs no code that the folder names: a custom reward has to be named again, on the command line.
        rewards = dataclasses.replace(own.rewards, custom=config.rewards.custom)
        config = dataclasses.replace(own, run_dir=str(folder), rewards=rewards)
    run.use_cache(config)
    run.console.print(f"written: {run.escape(str(report.write_report(folder, config)))}")


if __name__ == "__main__":
    run.main(main, __doc__)
