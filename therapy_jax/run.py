"""What every script shares: the run folder, progress, and the manner in which a user's mistake is answered.

runs/NAME/config.yaml        the resolved config: `--config runs/NAME/config.yaml` runs it again
          metrics.jsonl      one object a logged step: stage, step, seconds, every metric; unique by stage and step
          tensorboard/       the same as events, where the config says `tensorboard: true`
          error.log          the last fault that nobody expected (error.1.log: of process 1)
          environment.json   per stage: commit, versions, devices, when and how long
          {base,sft,ppo}/    model/ = a Hugging Face folder (origin.json: what it learnt from), checkpoints/ = orbax
          classifiers/       the heads on the SFT trunk, and how they were chosen
          samples.jsonl      the same prompts answered again and again while PPO goes on
          results.json       the evaluation; answers.json: every system's reply to every prompt
          report.html        all of this to look at, in one file; figures/ = its pictures, loupe.json = a reply token by token
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import functools
import importlib.metadata
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from therapy_jax import config as config_module
from therapy_jax import logs
from therapy_jax.config import Config, ConfigError, DataConfig, SamplingConfig
from therapy_jax.dialogue import DataError, Dialogue, Report, read_dialogues
from therapy_jax.files import as_path, flatten, is_remote, write_json, write_text

console = Console(highlight=False, soft_wrap=True)
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
EXIT_CODES = (
    "Exit codes: 0 done; 2 a mistake or a full disk, in one sentence; 75 stopped by SIGTERM or Ctrl-C, saved, and the same "
    "command goes on; 130 stopped at once by a second Ctrl-C."
)
COMPILING = "compiling: about a minute, cached afterwards"
DOCTOR = "python scripts/doctor.py says why and what to do"


begun: set[str] = set()  # stages whose work has begun: config.yaml is theirs now, whatever ends them
_before: dict[Path, str] = {}  # config.yaml as it lay in the run folder when this process came


def main(script: Callable[..., None], description: str | None, options: type | None = None) -> None:
    """Parse the command line, run script(config), or script(config, options) where it has flags of its own. A user's mistake,
    or a disk that is full, ends with one sentence and exit code 2, no traceback; a signal ends with code 75, and the same
    command goes on (stopping.py). What ends one of several processes ends all (processes.py)."""
    config, own = parse(description, options)
    from therapy_jax import processes, stopping
    from therapy_jax.checkpoint import CheckpointError
    from therapy_jax.rewards.combine import RewardError
    from therapy_jax.weights import WeightsError

    def end(code: int, message: str, mark: str = "") -> NoReturn:
        console.quiet = False  # a process that writes nothing else still says why it ends
        console.print(f"{mark}{escape(message)}")
        processes.tell(code, message)
        sys.exit(code)

    stopping.listen(console.print)
    deepen_compiler_stack()
    written, red = as_path(config.run_dir) / "config.yaml", "[bold red]error:[/] "
    try:
        if written.is_file():
            _before[written] = written.read_text(encoding="utf-8")
        script(config) if options is None else script(config, own)
    except (ConfigError, DataError, WeightsError, CheckpointError, RewardError) as error:
        put_back()
        end(2, str(error), red)
    except stopping.StoppedAlone as stop:
        end(stopping.EXIT_CODE, f"{stop}; the same command goes on")
    except stopping.Stopped as stop:  # all processes have, at the same step
        console.print(f"{stop}; the same command goes on")
        sys.exit(stopping.EXIT_CODE)
    except KeyboardInterrupt:
        end(stopping.INTERRUPTED, "stopped; the same command goes on from the last checkpoint")
    except Exception as error:
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            where = error.filename or config.run_dir
            end(2, f"{where}: {error.strerror}; what is saved stays, and the same command goes on", red)
        processes.give_way()
        if processes.is_loss_of_another(error):
            reason = str(error).splitlines()[0][:200]
            again = "start all of them again: they go on from the last checkpoint"
            end(stopping.EXIT_CODE, f"another process has ended or cannot be reached ({reason}); {again}", red)
        console.quiet = False
        keep_traceback(config)
        if processes.service() is not None:
            traceback.print_exc()  # it ends before Python would
            processes.tell(1, f"a fault of the program: {type(error).__name__}: {error}")
        raise


def put_back() -> None:
    """Where a run is refused before any work of it has begun, what lies in its folder is still of the settings before."""
    from therapy_jax import processes

    with contextlib.suppress(OSError):  # a full disk may be what the refusal is about
        for path, text in _before.items():
            # who writes is asked last: where JAX finds no device, no process can say
            if not begun and path.read_text(encoding="utf-8") != text and processes.is_writer():
                write_text(path, text)


def hear(code: int, message: str) -> None:
    """Why another process ends, and this one with it."""
    if code == 2:
        put_back()
    console.quiet = False
    console.print(escape(message))


def keep_traceback(config: Config) -> None:
    """Of what nobody expected: into the run folder, where there is one, and a word on where it lies."""
    from therapy_jax import processes

    folder = as_path(config.run_dir)
    path = folder / (f"error.{processes.index()}.log" if processes.index() else "error.log")
    with contextlib.suppress(OSError):
        if folder.is_dir():
            write_text(path, traceback.format_exc())
            console.print(
                f"[bold red]unexpected:[/] a fault of the program, not of yours; traceback: {escape(str(path))}, "
                f"what was logged: {escape(str(folder / 'metrics.jsonl'))}. What is saved stays, and the same command goes on"
            )


def parse(description: str | None, options: type | None = None) -> tuple[Config, Any]:
    """The command line -> (Config, options). Scripts whose imports take seconds ask for it before them, so that --help and a
    misspelt key are answered at once; main gets the same again."""
    return _parse(tuple(sys.argv[1:]), f"{description or ''}\n\n{EXIT_CODES}", options)


@functools.cache
def _parse(argv: tuple[str, ...], description: str, options: type | None) -> tuple[Config, Any]:
    return config_module.parse_with(options, list(argv), description)


def deepen_compiler_stack() -> None:
    """libtpu compiles on threads with small stacks, and the step of a model with dropout over several chips overflows them
    (SIGSEGV in FusedSpatialMajorConvolution). Only where the version is one that was tried: libtpu ends a process at a flag
    that it does not know. Whoever sets LIBTPU_INIT_ARGS decides alone."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        if importlib.metadata.version("libtpu").startswith("0.0.42."):
            os.environ.setdefault("LIBTPU_INIT_ARGS", "--fibers_default_thread_stack_size=1048576")


def escape(text: str) -> str:
    """Text from data, a model or a server, safe from rich's markup; what a terminal would obey, such as ESC, shows as ·."""
    from rich.markup import escape as rich_escape

    return rich_escape("".join(c if c.isprintable() or c in "\n\t" else "·" for c in text))


def warn(message: str) -> None:
    console.print(f"[yellow]{escape(message)}")


def start(config: Config, stage: str) -> Path:
    """Make and lock the run folder, write the resolved config, note the surroundings, switch the compilation cache on.
    Raises ConfigError where the folder cannot be written or is in use by another run, or the processes differ in settings."""
    import jax

    from therapy_jax import processes, sharding, stopping

    if config.mesh.coordinator is not None:
        sharding.connect(config.mesh)
        processes.watch(hear)
        stopping.take_signals()  # jax.distributed has taken SIGTERM for itself
    check_platform(config.require)
    check_agreement(config)
    folder = as_path(config.run_dir)
    console.quiet = not processes.is_writer()
    if processes.is_writer():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock(folder)
            write_text(folder / "config.yaml", config_module.to_yaml(config))
        except OSError as error:
            raise ConfigError(
                f"run_dir {folder} cannot be written ({error.strerror or error}); choose another with --run_dir"
            ) from error
    processes.wait_for_all("run folder")
    if config.tensorboard:
        logs.open_events(folder)
    use_cache(config)
    devices = jax.devices()
    if devices[0].platform == "cpu":
        keep_freed_memory()
    console.print(
        f"[bold]{stage}[/]: {len(devices)} x {devices[0].device_kind} ({devices[0].platform}), run folder {escape(str(folder))}"
    )
    return folder


def use_cache(config: Config) -> None:
    """Keep compiled programs in the folder that the config names, so that a second start need not compile."""
    import jax

    if config.compilation_cache is not None:
        jax.config.update("jax_compilation_cache_dir", str(as_path(config.compilation_cache)))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


_locks: dict[str, int] = {}  # run folders that this process holds -> file descriptors, until it ends


def lock(folder: Path) -> None:
    """Hold the run folder until this process ends, whatever ends it; a stage that is started within it holds it already.
    Raises ConfigError naming the process that has it. An object store has no locks."""
    if is_remote(folder):
        console.print(f"{escape(str(folder))}: cannot be locked; take care that no other run writes here")
        return
    name = str(folder.resolve())
    if name in _locks:
        return
    file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = os.read(file, 20).decode(errors="replace").strip()
        os.close(file)
        raise ConfigError(
            f"run_dir {folder} is in use by another run (process {pid or 'unknown'}); wait for it, or choose another run_dir"
        ) from None
    except OSError as error:  # a network file system without locks
        console.print(
            f"{escape(str(folder))}: cannot be locked ({error.strerror}); take care that no other run writes here"
        )
    os.ftruncate(file, 0)
    os.write(file, f"{os.getpid()}\n".encode())
    _locks[name] = file


def check_platform(wanted: str | None) -> None:
    """Raises ConfigError where JAX finds no device at all, or runs on another platform than `wanted`: it falls back to the
    CPU with no more than a warning, and a run would be lost in slowness. Nothing has been written by then."""
    import jax

    try:
        device = jax.devices()[0]
    except RuntimeError as error:  # JAX_PLATFORMS names what is not here
        raise ConfigError(f"JAX finds no device ({str(error).splitlines()[0]}); {DOCTOR}") from error
    if wanted is not None and device.platform != wanted:
        raise ConfigError(
            f"--require {wanted}, but JAX runs on {device.platform} here ({jax.device_count()} x {device.device_kind}); {DOCTOR}"
        )


def check_agreement(config: Config) -> None:
    """Raises ConfigError in every process where one was started with other settings or code than process 0; it says which."""
    from therapy_jax import processes

    settings = {key: repr(value) for key, value in flatten(dataclasses.asdict(config)).items()}
    mine = {"commit": str(logs.commit()), **settings}
    for name in ("mesh.coordinator", "mesh.process"):  # how each finds the others
        del mine[name]
    first = processes.shared(mine)
    keys = [key for key in sorted(mine | first) if mine.get(key) != first.get(key)]
    if processes.in_any(bool(keys)):
        me = f"process {processes.index()}"
        differing = [f"{key} is {mine.get(key)} in {me}, {first.get(key)} in process 0" for key in keys]
        raise ConfigError(
            "the processes were started with different settings or code "
            f"({'; '.join(differing[:5]) or 'those that differ say in what'}); start all of them with the same"
        )


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
    """The conversations of a data set, and on the screen what cleaning changed and which rows were left out. Raises ConfigError
    where the processes do not read the same."""
    report = Report()
    dialogues = read_dialogues(data.path, data.format, data.splits, data.clean, data.on_bad_row, seed, report)
    counted = ", ".join(f"{len(part):,} {split}" for split, part in dialogues.items())
    console.print(f"data: {escape(data.path or 'the built-in sample')}: {counted} conversations")
    for line in report.lines():
        console.print(f"  {escape(line)}")
    from therapy_jax import origin, processes

    if processes.service() is not None:
        mine = origin.content(dialogues)
        if processes.in_any(mine != processes.shared(mine)):
            raise ConfigError(f"{data.path}: not the same file on every host; copy that of process 0 to all")
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


def check_finite(metrics: Mapping[str, Any]) -> None:
    """Raises ConfigError naming a metric that is NaN or infinite: going on would only spoil the checkpoints. Reward terms
    are looked at first, since one that is NaN makes the loss and all that follows NaN."""
    for name, value in sorted(metrics.items(), key=lambda item: not item[0].startswith("reward/")):
        if not math.isfinite(value):
            what = f"reward term {name.removeprefix('reward/')}" if name.startswith("reward/") else name
            raise ConfigError(
                f"{what} is {value}; lower the learning rate, or start again from the last checkpoint in another run_dir"
            )


def give_up(folder: Path, stage: str, step: int, line: Mapping[str, Any], batch: Mapping[str, Any]) -> NoReturn:
    """Raises ConfigError: too many updates in a row were skipped. The state is saved and the line logged; the last batch goes
    to bad_batch.json."""
    from therapy_jax import processes

    if processes.is_writer():
        write_json(folder / "bad_batch.json", {"stage": stage, "step": step, **batch})
    raise ConfigError(
        f"{stage}: {line['bad_in_a_row']:.0f} updates in a row had a loss or gradients that are not finite, and were skipped; the "
        f"state of step {step} is saved, its batch is in {folder / 'bad_batch.json'}. The same command tries the batches that "
        "follow; if all are bad, lower the learning rate, in another run_dir"
    )


@contextlib.contextmanager
def progress(stage: str, total: int, done: int = 0, at_first: str = COMPILING) -> Iterator[Callable[..., None]]:
    """A bar with rate and time left on a terminal; a line every ten seconds where the output is a file or a pipe.

    Yields advance(step, **numbers): the numbers that matter, shown as they are given.
    """
    began = time.monotonic()
    begun.add(stage)

    def rate(step: int) -> str:
        each = (time.monotonic() - began) / max(step - done, 1)
        return f"{each:.1f} s each" if each > 1 else f"{1 / max(each, 1e-6):.1f}/s"

    if console.is_terminal:
        columns = (
            TextColumn("{task.description:>10}"),
            BarColumn(24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(stage, total=total, completed=done, numbers=at_first, rate="")
            yield lambda step, **numbers: bar.update(task, completed=step, numbers=show(numbers), rate=rate(step))
        return
    shown = 0.0

    def advance(step: int, **numbers: Any) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown >= 10 or step == total:
            shown = now
            left = (now - began) / max(step - done, 1) * (total - step)
            say(f"{stage} {step}/{total}  {show(numbers)}  {rate(step)}, {left:.0f} s left")

    def say(line: str) -> None:
        if not console.quiet:
            print(line, flush=True)

    say(f"{stage} {done}/{total}  {at_first}")
    yield advance


def show(numbers: Mapping[str, Any]) -> str:
    return "  ".join(
        f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}" for name, value in numbers.items()
    )
