"""The two sides of a comparison: each a process of its own, asked line by line, both given the same models and batches."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from benchmark_rows import Shapes, Size, make_batch

ROOT = Path(__file__).resolve().parent.parent


class BenchmarkError(Exception):
    """What keeps the benchmark, or one row of it, from being run; one sentence."""


Ask = Callable[[dict[str, Any]], dict[str, Any]]


@contextlib.contextmanager
def start_worker(python: str, script: str, threads: int, environment: Mapping[str, str]) -> Iterator[Ask]:
    """A worker process for as long as the block lasts. Yields ask(question) -> answer; BenchmarkError where it ends
    instead, with the last line that it said."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        command = [python, str(ROOT / "scripts" / script), "--threads", str(threads)]
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=dict(environment)
            )
        except OSError as error:
            raise BenchmarkError(f"{python} cannot be started ({error.strerror})") from error
        assert process.stdin is not None and process.stdout is not None
        asking, answers = process.stdin, process.stdout

        def ask(question: dict[str, Any]) -> dict[str, Any]:
            with contextlib.suppress(BrokenPipeError):
                asking.write(json.dumps(question) + "\n")
                asking.flush()
            if line := answers.readline():
                return json.loads(line)
            process.wait()
            errors.seek(0)
            said = [line.strip() for line in errors.read().splitlines() if line.strip()]
            raise BenchmarkError(f"{script}: {said[-1] if said else f'ended with code {process.returncode}'}")

        try:
            yield ask
        finally:
            with contextlib.suppress(BrokenPipeError):
                asking.close()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            answers.close()


class Settings(NamedTuple):
    """What holds for the whole benchmark."""

    folder: Path  # models, batches and what the sides must agree on
    python: str  # of the peers
    threads: int
    repeats: int  # pairs
    seconds: float  # about the least time of one run: short steps are repeated
    malloc: dict[str, str]

    def worker(self, script: str, row: str = "") -> contextlib.AbstractContextManager[Ask]:
        """A compilation cache of its own for each row: what compiling costs is what it costs the first time."""
        ours = script != "benchmark_torch.py"
        environment = {
            **{k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"},
            **self.malloc,
            "OMP_NUM_THREADS": str(self.threads),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # a GPU has to hold both sides
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "inductor" / row.replace(" ", "_").replace("/", "_")),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if ours:
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return start_worker(sys.executable if ours else self.python, script, self.threads, environment)


def write_inputs(settings: Settings, sizes: Mapping[str, Size], shapes: Mapping[str, Shapes]) -> None:
    """folder/MODEL, which both sides load, and folder/MODEL.WORK.npz, the batches."""
    for model, size in sizes.items():
        shape = shapes[model]
        positions = max(shape.sft[1], sum(shape.generate[1:]), sum(shape.ppo[1:3]), shape.memory[1], shape.long[1])
        config = {
            "vocab_size": size.vocabulary,
            "n_positions": max(1024, positions),
            "n_embd": size.width,
            "n_layer": size.layers,
            "n_head": size.heads,
            "eos_token_id": size.vocabulary - 1,
        }
        with settings.worker("benchmark_jax.py") as ask:
            ask({"do": "prepare", "work": "export", "folder": str(settings.folder / model), "sizes": config})
        for work in ("sft", "replies", "long", "memory", "generate", "ppo", "rewards"):
            arrays: dict[str, Any] = dict(make_batch(work, size, shape))
            np.savez(settings.folder / f"{model}.{work}.npz", **arrays)
