"""Scripts as real processes that start at once: everything is imported here, once, and each run is a fork of this process.

Reads JSON lines from stdin: {"script": name, "flags": [...], "output": path, "environment": {...}}; says the process id of
the run, and its exit code once it has ended. No device is touched before the fork.

KILL_AT=n FOLDER=path in the environment: the run kills itself (SIGKILL) just before its n-th file operation (open, rename,
mkdir, remove, ... as Python's audit events tell) below that folder. At the end it says how many there were.
"""

import json
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
import train_ppo  # noqa: E402
import train_sft  # noqa: E402
import transformers  # noqa: E402

from therapy_jax import run  # noqa: E402

SCRIPTS = {"train_sft": train_sft.main, "train_ppo": train_ppo.main}


def count_files(folder: str, kill_at: int) -> list[int]:
    count = [0]

    def hook(event: str, arguments: tuple) -> None:
        if event == "open" or event.startswith(("os.", "shutil.")):
            paths = [x for x in arguments if isinstance(x, (str, os.PathLike))]
            if any(os.fspath(path).startswith(folder) for path in paths):
                count[0] += 1
                if count[0] == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return count


def child(script: str, flags: list[str], output: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for standard in (1, 2):
        os.dup2(file, standard)
    os.close(file)
    sys.argv = [script, *flags]
    count = count_files(os.environ.get("FOLDER", "/nowhere"), int(os.environ.get("KILL_AT", "0")))
    code = 0
    try:
        run.main(SCRIPTS[script], "")
    except SystemExit as stop:
        code = stop.code
    print(f"file operations: {count[0]}", flush=True)
    os._exit(code)


if __name__ == "__main__":
    transformers.AutoTokenizer  # noqa: B018  a lazy import, else made in each run anew
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            child(**json.loads(line))
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
