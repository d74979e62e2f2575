"""What every script shares: the run folder, log lines, progress, and the manner in which a user's mistake is answered.

runs/NAME/config.yaml        the resolved config: `--config runs/NAME/config.yaml` runs it again
          metrics.jsonl      one object a logged step: stage, step, seconds, every metric; unique by stage and step
          environment.json   per stage: commit, versions, devices, when and how long
          {base,sft,ppo}/    model/ = a Hugging Face folder, checkpoints/ = orbax
          samples.jsonl      the same prompts answered again and again while PPO goes on
          results.json       the evaluation
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import functools
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from therapy_jax import config as config_module
from therapy_jax.config import Config, ConfigError, DataConfig, SamplingConfig
from therapy_jax.dialogue import DataError, Dialogue, Exchange, Report, read_dialogues
from therapy_jax.files import write_json

console = Console(highlight=False, soft_wrap=True)
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "transformers", "nltk", "rouge-score")


def main(script: Callable[..., None], description: str, options: type | None = None) -> None:
    """Parse the command line, run script(config), or script(config, options) where it has flags of its own; a user's mistake
    ends with one sentence and exit code 2, no traceback."""
    config, own = config_module.parse_with(options, description=description)
    from therapy_jax.checkpoint import CheckpointError
    from therapy_jax.rewards.combine import RewardError
    from therapy_jax.weights import WeightsError

    try:
        script(config) if options is None else script(config, own)
    except (ConfigError, DataError, WeightsError, CheckpointError, RewardError) as error:
        console.print(f"[bold red]error:[/] {escape(str(error))}")
        sys.exit(2)
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from the last checkpoint")
        sys.exit(130)


def escape(text: str) -> str:
    """Text from data or a model, safe from rich's markup."""
    from rich.markup import escape as rich_escape

    return rich_escape(text)


def start(config: Config, stage: str) -> Path:
    """Make the run folder, write the resolved config, note the surroundings, switch the compilation cache on."""
    import jax

    folder = Path(config.run_dir).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(config_module.to_yaml(config), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"run_dir {folder} cannot be written ({error.strerror}); choose another with --run_dir"
        ) from error
    if config.compilation_cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(Path(config.compilation_cache).expanduser()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    commit()
    devices = jax.devices()
    if devices[0].platform == "cpu":
        keep_freed_memory()
    console.print(
        f"[bold]{stage}[/]: {len(devices)} x {devices[0].device_kind} ({devices[0].platform}), run folder {escape(str(folder))}"
    )
    return folder


def keep_freed_memory() -> None:
    """On CPU: let malloc keep what is freed instead of handing it back to the kernel and faulting it in again at the next
    step. XLA allocates each step's temporaries anew; this makes steps up to twice as fast (glibc only)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8  # <malloc.h>
        for option, value in ((m_mmap_max, 0), (m_trim_threshold, 2**31 - 1), (m_arena_max, 1)):
            mallopt(option, value)


def release_freed_memory() -> None:
    """Hand back what malloc has kept so far. Batches of many lengths leave holes that the next one does not fit into, and
    memory would grow without end; called now and then, this keeps it near the peak of a single step."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if malloc_trim is not None:
        malloc_trim(0)


def read_data(data: DataConfig, seed: int) -> dict[str, list[Dialogue]]:
    """The conversations of a data set, and on the screen what cleaning changed and which rows were left out."""
    report = Report()
    dialogues = read_dialogues(data.path, data.format, data.splits, data.clean, data.on_bad_row, seed, report)
    counted = ", ".join(f"{len(part):,} {split}" for split, part in dialogues.items())
    console.print(f"data: {escape(data.path or 'the built-in sample')}: {counted} conversations")
    for line in report.lines():
        console.print(f"  {escape(line)}")
    return dialogues


def decoding(config: Config) -> SamplingConfig:
    """How replies are decoded wherever systems are judged: in the evaluation, and in the validation that chooses."""
    judged = config.evaluate
    return SamplingConfig(config.sampling.max_new_tokens, judged.temperature, judged.top_k, judged.top_p)


def compute_dtype(config: Config) -> str:
    """bfloat16 matrix products where the hardware is made for them, float32 on CPU, or what the config says."""
    import jax

    if config.model.compute_dtype != "auto":
        return config.model.compute_dtype
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


@contextlib.contextmanager
def count_compilations() -> Iterator[Callable[[], int]]:
    """Yields a function that says how many programs XLA was asked for since (compiled, or taken from the cache): a loop
    that compiles at every step is a loop that is broken, and nothing else would tell."""
    from jax import monitoring

    count = 0

    def listener(event: str, duration_secs: float, **kwargs: str | int) -> None:
        nonlocal count
        count += event == "/jax/core/compile/backend_compile_duration"

    monitoring.register_event_duration_secs_listener(listener)
    try:
        yield lambda: count
    finally:
        monitoring.unregister_event_duration_listener(listener)


def note_environment(folder: Path, stage: str, seconds: float) -> None:
    """Add to environment.json what a table in a README must name beside its figures."""
    import jax

    path = folder / "environment.json"
    stages = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    before = stages.get(stage, {}).get("seconds", 0.0)  # a stage that was stopped and went on counts all its time
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
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        )
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "-uno", "--", here], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def log(folder: Path, stage: str, step: int, metrics: Mapping[str, Any], started: float) -> None:
    """One line of metrics.jsonl. `started`: time.monotonic() at the start of the stage."""
    line = {
        "stage": stage,
        "step": step,
        "seconds": round(time.monotonic() - started, 2),
        **{k: plain(v) for k, v in metrics.items()},
    }
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def logged(folder: Path, stage: str, step: int) -> dict[str, Any]:
    """What `log` wrote for a step; empty where there is nothing."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = [record for line in lines if (record := json.loads(line))["stage"] == stage and record["step"] == step]
    return found[-1] if found else {}


def log_samples(
    folder: Path, step: int, texts: Sequence[str], emotions: Sequence[str | None], exchanges: Sequence[Exchange]
) -> None:
    """Append the replies of one evaluation to samples.jsonl."""
    with (folder / "samples.jsonl").open("a", encoding="utf-8") as file:
        for text, emotion, exchange in zip(texts, emotions, exchanges, strict=True):
            record = {"stage": "ppo", "step": step, "client": exchange.client.text, "reply": text, "emotion": emotion}
            file.write(json.dumps({**record, "therapist": exchange.therapist.text}, ensure_ascii=False) + "\n")


def check_finite(metrics: Mapping[str, Any]) -> None:
    """Raises ConfigError naming a metric that is NaN or infinite: going on would only spoil the checkpoints. Reward terms
    are looked at first, since one that is NaN makes the loss and all that follows NaN."""
    for name, value in sorted(metrics.items(), key=lambda item: not item[0].startswith("reward/")):
        if not math.isfinite(value):
            what = f"reward term {name.removeprefix('reward/')}" if name.startswith("reward/") else name
            raise ConfigError(
                f"{what} is {value}; lower the learning rate, or start again from the last checkpoint in another run_dir"
            )


def plain(value: Any) -> Any:
    """A scalar array -> a Python number of six digits; anything else as it is."""
    return float(f"{float(value):.6g}") if hasattr(value, "dtype") or isinstance(value, float) else value


def forget_after(path: Path, stage: str, step: int) -> None:
    """Drop this stage's lines beyond `step`: they were written after the checkpoint that a restart goes on from."""
    if not path.is_file():
        return
    lines = [
        line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")
    ]  # not a line cut by a kill
    kept = [line for line in lines if (record := json.loads(line))["stage"] != stage or record["step"] <= step]
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(partial, path)


@contextlib.contextmanager
def progress(stage: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
    """A bar with rate and time left on a terminal; a line every ten seconds where the output is a file or a pipe.

    Yields advance(step, **numbers): the numbers that matter, shown as they are given.
    """
    if console.is_terminal:
        columns = (
            TextColumn("{task.description:>10}"),
            BarColumn(24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(stage, total=total, completed=done, numbers="compiling ...")
            yield lambda step, **numbers: bar.update(task, completed=step, numbers=show(numbers))
        return
    began, shown = time.monotonic(), 0.0

    def advance(step: int, **numbers: Any) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown >= 10 or step == total:
            shown = now
            left = (now - began) / max(step - done, 1) * (total - step)
            print(f"{stage} {step}/{total}  {show(numbers)}  {now - began:.0f} s, {left:.0f} s left", flush=True)

    print(f"{stage} {done}/{total}  compiling ...", flush=True)
    yield advance


def show(numbers: Mapping[str, Any]) -> str:
    return "  ".join(
        f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}" for name, value in numbers.items()
    )
