"""What a run would meet on this machine: one line each, ok, warning or error, with the remedy. Exit code 1 on any error.

Takes what the other scripts take (`--config`, `--run_dir`, `--require tpu`, ...) and looks at what that run would need. It
trains nothing and leaves nothing behind but METEOR's copy of WordNet. On a pod slice, run it on all workers at once: JAX
on one host waits for the others.
"""

import importlib.metadata
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from therapy_jax import config as config_module
from therapy_jax.config import Config

ROOT = Path(__file__).resolve().parent.parent
TPU_LOCK = Path("/tmp/libtpu_lockfile")  # libtpu's own: one process a host
INSTALL = "bash scripts/quickstart.sh, or python -m pip install -c constraints.txt -e ."
SECONDS = 90  # for JAX to start; a TPU that another process holds may keep it waiting for ever
ASK_JAX = """
import json, jax
devices = jax.devices()
stats = jax.local_devices()[0].memory_stats() or {}
found = {"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices)}
print(json.dumps(found | {"processes": jax.process_count(), "bytes": stats.get("bytes_limit")}))
"""


class Finding(NamedTuple):
    level: str  # ok, warning or error
    about: str
    what: str
    remedy: str = ""


def main() -> int:
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a pipe may not speak UTF-8
    try:
        config = config_module.parse(description=__doc__)
    except ModuleNotFoundError:  # the command line's own parser is not installed: `packages` will say so
        config = Config()
    levels = []
    for finding in findings(config):
        levels.append(finding.level)
        print(show(finding, colour=sys.stdout.isatty()), flush=True)
    errors, warnings = levels.count("error"), levels.count("warning")
    print(f"{errors} error(s), {warnings} warning(s)")
    return 1 if errors else 0


def show(finding: Finding, colour: bool = False) -> str:
    """One line, and a second one with the remedy. What comes from other processes or files is printed, never obeyed."""
    level, about, what, remedy = ("".join(c if c.isprintable() else "?" for c in text) for text in finding)
    code = {"ok": 32, "warning": 33, "error": 31}[level]
    start = f"\033[{code}m{level:<8}\033[0m" if colour else f"{level:<8}"
    return f"{start} {about:<17} {what}" + (f"\n{'':<8} {'':<17} -> {remedy}" if remedy else "")


def findings(config: Config) -> Iterator[Finding]:
    yield python()
    yield from packages()
    tpus, gpus = accelerators()
    yield Finding("ok", "accelerators", f"{tpus} TPU and {gpus} GPU device file(s)")
    yield from tpu_holders(TPU_LOCK, needed=tpus > 0 or config.require == "tpu")
    yield from gpu_holders()
    yield jax_finding(*ask_jax(), seen="tpu" if tpus else "gpu" if gpus else None, wanted=config.require)
    yield folder("run_dir", config.run_dir)
    if config.compilation_cache is not None:
        yield folder("compilation_cache", config.compilation_cache)
    yield hub()
    yield wordnet()


def python() -> Finding:
    found, wanted = platform.python_version(), "3.11 to 3.14"
    fits = (3, 11) <= sys.version_info[:2] <= (3, 14)
    return Finding("ok" if fits else "error", "python", f"{found}, {sys.executable}", "" if fits else f"use {wanted}")


def packages(pyproject: Path = ROOT / "pyproject.toml") -> Iterator[Finding]:
    """What is installed against the bounds of pyproject.toml, then which extras are here."""
    try:
        from packaging.requirements import Requirement
    except ModuleNotFoundError:
        yield Finding("error", "packages", "not installed for this Python", INSTALL)
        return

    def faults(text: str) -> list[str]:
        """What is missing or out of bounds; an extra such as jax[tpu] is here when the packages that it asks for are."""
        wanted = Requirement(text)
        try:
            version = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            return [f"{wanted} is missing"]
        if not wanted.specifier.contains(version, prereleases=True):
            return [f"{wanted.name} is {version}, needs {wanted.specifier}"]
        found = []
        for part in map(Requirement, importlib.metadata.requires(wanted.name) or () if wanted.extras else ()):
            if (marker := part.marker) is None or marker.evaluate({"extra": ""}):
                continue  # not of an extra
            if any(marker.evaluate({"extra": extra}) for extra in wanted.extras):
                part.extras, part.marker = set(), None
                found += faults(str(part))
        return found

    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    wrong = [fault for text in project["dependencies"] for fault in faults(text)]
    if wrong:
        yield Finding("error", "packages", "; ".join(wrong), INSTALL)
    else:
        names = ["jax", *(Requirement(text).name for text in project["dependencies"])]
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in dict.fromkeys(names))
        yield Finding("ok", "packages", versions)
    here = {extra: not any(map(faults, texts)) for extra, texts in project["optional-dependencies"].items()}
    told = ", ".join(f"{extra} {'yes' if found else 'no'}" for extra, found in here.items())
    yield Finding("ok", "extras", told)


def accelerators() -> tuple[int, int]:
    """(TPU chips, GPUs) by their device files: what the machine has, whether or not JAX can use it."""
    dev = Path("/dev")
    tpus = [*dev.glob("accel[0-9]*")] or [*dev.glob("vfio/[0-9]*")]
    return len(tpus), len([*dev.glob("nvidia[0-9]*")])


def tpu_holders(lock: Path, needed: bool = True) -> Iterator[Finding]:
    """A TPU serves one process a host; who has libtpu's lock, or the chips themselves? Compiling ahead of time takes the
    lock as well, on a machine that has no TPU."""
    level = "error" if needed else "warning"
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev").glob("vfio/[0-9]*")]
    held = {pid for path in (lock, *chips) for pid in holders(path)}
    for pid in sorted(held):
        remedy = f"wait until it ends, or stop it: kill {pid}"
        yield Finding(level, "TPU", f"held by process {pid} ({command(pid)})", remedy)
    if not held and lock.exists() and not os.access(lock, os.W_OK):
        what = f"{lock} was left behind by another user, no process is seen to hold it"
        remedy = f"sudo {sys.executable} scripts/doctor.py sees all processes; if none holds it: sudo rm {lock}"
        yield Finding(level, "TPU", what, remedy)


def holders(path: Path) -> set[int]:
    """Other processes that hold a lock on a file (/proc/locks) or have it open (/proc/PID/fd, one's own user's only)."""
    try:
        status = path.stat()
    except OSError:
        return set()
    inode = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    locks = Path("/proc/locks")
    lines = locks.read_text().splitlines() if locks.exists() else []
    # "1: FLOCK ADVISORY WRITE pid inode start end"; a waiting one has "->" after the number
    pids = {int(words[4]) for words in map(str.split, lines) if len(words) == 8 and words[5] == inode}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.path.samestat(status, fd.stat()) for fd in (process / "fd").iterdir()):
                pids.add(int(process.name))
        except OSError:  # ended meanwhile, or another user's
            continue
    return {pid for pid in pids if pid > 0} - {os.getpid()}


def command(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return "its command cannot be read"
    return " ".join(words).strip()[:100]


def gpu_holders() -> Iterator[Finding]:
    """What nvidia-smi says of the cards and of the processes on them; nothing where it is not installed."""
    if shutil.which("nvidia-smi") is None:
        return

    def ask(query: str) -> list[str]:
        asked = ["nvidia-smi", f"--query-{query}", "--format=csv,noheader"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True)
        return [line.strip() for line in done.stdout.splitlines() if line.strip()]

    try:
        for line in ask("gpu=name,memory.total,memory.used,driver_version"):
            yield Finding("ok", "GPU", line)
        for line in ask("compute-apps=pid,process_name,used_memory"):
            pid = line.split(",")[0]
            remedy = f"JAX takes 75 % of a card at its start: wait, stop it (kill {pid}), or choose a card by CUDA_VISIBLE_DEVICES"
            yield Finding("warning", "GPU", f"in use by process {line}", remedy)
    except (OSError, subprocess.SubprocessError) as error:
        yield Finding("warning", "GPU", f"nvidia-smi fails ({type(error).__name__})", "is the NVIDIA driver loaded?")


def ask_jax(seconds: float = SECONDS) -> tuple[dict[str, Any] | None, str]:
    """(what JAX finds or None, why not) from a process of its own: a held TPU makes JAX wait, or abort."""
    # Without preallocation: asking must not take a GPU's memory from a run that goes on.
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+", errors="replace") as err:
        child = subprocess.Popen(
            [sys.executable, "-c", ASK_JAX], stdout=out, stderr=err, env=environment, start_new_session=True
        )
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # not waited for: a process deep in a driver may never go
            return None, f"it did not start within {seconds:g} s"
        out.seek(0)
        err.seek(0)
        said = [line for line in err.read().splitlines() if line.strip()]
        if child.returncode:
            return None, said[-1] if said else f"it ended with {child.returncode}"
        return json.loads(out.read().splitlines()[-1]), next((line for line in said if "alling back" in line), "")


def jax_finding(found: dict[str, Any] | None, why: str, seen: str | None, wanted: str | None) -> Finding:
    asked = os.environ.get("JAX_PLATFORMS")
    remedy = {
        "tpu": 'install the extra "tpu" and stop whatever holds the TPU; on a pod slice run this on all workers at once',
        "gpu": 'install the extra "cuda" (driver 580 or newer) and unset LD_LIBRARY_PATH',
        None: "see README, TPU and GPU",
    }[wanted if wanted in ("tpu", "gpu") else seen]
    if asked:
        remedy += f"; JAX_PLATFORMS is {asked}: unset it to let JAX choose"
    if found is None:
        return Finding("error", "jax", f"finds no device: {why}", remedy)
    size = f", {found['bytes'] / 1e9:.1f} GB each" if found["bytes"] else ""
    text = f"{found['count']} x {found['kind']} ({found['platform']}){size}, {found['processes']} process(es)"
    if asked:
        text += f", JAX_PLATFORMS={asked}"
    if wanted is not None and found["platform"] != wanted:
        return Finding("error", "jax", f"{text}, but --require {wanted}{'; ' + why if why else ''}", remedy)
    if seen is not None and found["platform"] == "cpu":
        meant = (asked or "").split(",")[0] == "cpu"
        return Finding("warning" if meant else "error", "jax", f"{text}, though there is a {seen.upper()}", remedy)
    return Finding("ok", "jax", text)


def folder(about: str, path: str, little: float = 5e9, nothing: float = 2e8) -> Finding:
    """Can it be written, and is there room (bytes)? Tried with a real file in the nearest folder that exists."""
    if "://" in path:
        return Finding("ok", about, f"{path}: an object store, not looked at")
    wanted = Path(path).expanduser().absolute()
    nearest = next(p for p in (wanted, *wanted.parents) if os.path.exists(p))  # Path.exists raises in a closed folder
    remedy = f"choose another with --{about}"
    try:
        with tempfile.TemporaryFile(dir=nearest) as file:
            file.write(b"x" * 4096)
    except OSError as error:
        return Finding("error", about, f"{wanted} cannot be written ({error.strerror})", remedy)
    free = shutil.disk_usage(nearest).free
    level = "error" if free < nothing else "warning" if free < little else "ok"
    remedy = f"a checkpoint takes 12 bytes a parameter (PPO: 16, with its own critic 28), up to four are kept: free some, or {remedy}"
    what = f"{wanted} can be written, {free / 1e9:.1f} GB free"
    return Finding(level, about, what, "" if level == "ok" else remedy)


def hub(seconds: float = 5) -> Finding:
    """Models named by a hub id come from there; those in a local folder do not need it."""
    remedy = "give local folders: --model.name FOLDER (config.json, model.safetensors, tokenizer files)"
    try:
        from huggingface_hub import constants
    except ModuleNotFoundError:
        return Finding("warning", "hub", "its client is not installed", INSTALL)
    if constants.HF_HUB_OFFLINE:
        return Finding("warning", "hub", "not asked: HF_HUB_OFFLINE is set", remedy)
    try:
        with urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=seconds):
            return Finding("ok", "hub", f"{constants.ENDPOINT} answers")
    except (OSError, ValueError) as error:  # URLError and time-outs are OSErrors
        why = getattr(error, "reason", None) or error
        return Finding("warning", "hub", f"{constants.ENDPOINT} cannot be reached ({why})", remedy)


def wordnet() -> Finding:
    try:
        from therapy_jax.wordnet import reader
    except ModuleNotFoundError as error:
        return Finding("warning", "wordnet", f"cannot be looked for: {error}", INSTALL)
    if reader() is not None:
        return Finding("ok", "wordnet", "found: METEOR is nltk's")
    what = "not found: METEOR goes without synonyms, under the name meteor_exact_stem"
    remedy = "Debian, Ubuntu: apt-get install wordnet-base wordnet-sense-index; else: python -m nltk.downloader wordnet"
    return Finding("warning", "wordnet", what, remedy)


if __name__ == "__main__":
    sys.exit(main())
