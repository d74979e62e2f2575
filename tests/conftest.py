"""Eight virtual CPU devices and no hub, settled before anything imports jax; and the fixtures that many tests share."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

# Eight devices on two cores that are busy with other things wait long for one another; XLA would end the process after 40 s.
FLAGS = {
    "xla_force_host_platform_device_count": 8,
    "xla_cpu_collective_call_terminate_timeout_seconds": 900,
    "xla_cpu_collective_timeout_seconds": 900,
}
given = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join([given, *(f"--{k}={v}" for k, v in FLAGS.items() if k not in given)]).strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # tests fork processes after tokenizing
os.environ.setdefault(
    "THERAPY_JAX_CACHE", str(ROOT / ".pytest_cache" / "therapy_jax")
)  # WordNet's copy stays in the checkout
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax")
)  # halves the time of the next run
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


settings.register_profile("fixed", derandomize=True, print_blob=True)  # the same examples at each run
settings.load_profile("fixed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with most slow tests first: of two workers, one would else wait for a long file that the other began last."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])  # stable: a file's own order stays


def missing(reason: str) -> NoReturn:
    """Skips; fails instead where scripts/test.sh has installed what the tests need (CI=true, as root)."""
    if os.environ.get("CI") == "true" and os.geteuid() == 0:
        pytest.fail(reason)
    pytest.skip(reason)


def beside(finished: Path, folder: Path) -> Path:
    """A run folder that starts from the SFT model and the classifiers of another."""
    (folder / "sft").mkdir(parents=True)
    (folder / "sft" / "model").symlink_to(finished / "sft" / "model")
    (folder / "classifiers").symlink_to(finished / "classifiers")
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with MESC.csv and the other data sets, which are not ours to ship: $THERAPY_JAX_DATA or ../shared/data."""
    folder = Path(os.environ.get("THERAPY_JAX_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no data sets in {folder}: set THERAPY_JAX_DATA to a folder that has them")
    return folder


@pytest.fixture(scope="session")
def wordnet():
    """nltk's WordNet reader."""
    from therapy_jax.wordnet import reader

    found = reader()
    if found is None:
        missing("no WordNet: on Debian install wordnet-base and wordnet-sense-index")
    return found


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Path:
    """A run folder with base, SFT and PPO models of the smallest size, trained by the scripts in seconds."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    tiny = {
        "model.n_layer": 1, "model.n_embd": 32, "model.n_head": 2, "tokenizer.vocab_size": 600, "pretrain.epochs": 0.5,
        "sft.epochs": 0.5, "ppo.iterations": 1, "ppo.batch_size": 8, "ppo.replies_per_prompt": 2, "ppo.minibatches": 2,
        "ppo.eval_prompts": 8, "sampling.max_new_tokens": 12, "classifiers.epochs": 1,
    }  # fmt: skip
    flags = [part for name, value in tiny.items() for part in (f"--{name}", str(value))]
    for script in ("train_sft", "train_ppo"):
        args = [sys.executable, f"scripts/{script}.py", "--config", "configs/quickstart.yaml", "--run_dir", str(folder)]
        env = {**os.environ, "XLA_FLAGS": ""}  # one device, as a user has
        done = subprocess.run([*args, *flags], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_file():
    """Drops what a file has compiled: each program maps memory, Linux grants 65,530 maps a process, and XLA dies beyond."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
