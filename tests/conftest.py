"""Eight virtual CPU devices and no hub, settled before anything imports jax; and the fixtures that many tests share."""

import os
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent

if "--xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
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
    from therapy_jax import metrics

    reader = metrics.wordnet()
    if reader is None:
        missing("no WordNet: on Debian install wordnet-base and wordnet-sense-index")
    return reader


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
