"""What every script shares: log lines, also as TensorBoard events."""

import json
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from therapy_jax import logs, run
from therapy_jax.config import ConfigError
from therapy_jax.stopping import Stopped

ROOT = Path(__file__).parent.parent


def test_log_lines_are_tensorboard_events_too(tmp_path):
    """Read back as TFRecords: length u64, its checksum u32, an Event, its checksum u32."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    logs.open_events(tmp_path)
    logs.log(tmp_path, "ppo", 3, {"kl": 0.25, "alarm": "a text is no scalar"}, time.monotonic())
    logs.log(tmp_path, "ppo", 4, {"kl": 0.5}, time.monotonic())
    logs._events.pop(str(tmp_path)).close()  # a thread of its own writes
    (path,) = (tmp_path / "tensorboard").iterdir()
    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = event_pb2.Event.FromString(data[12 : 12 + length])
        found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        data = data[16 + length :]
    assert [entry for entry in found if entry[0] == "ppo/kl"] == [("ppo/kl", 3, 0.25), ("ppo/kl", 4, 0.5)]
    assert {tag for tag, *_ in found} == {"ppo/kl", "ppo/seconds"}


def test_tensorboard_without_its_extra_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(ConfigError, match=r"pip install 'therapy_jax\[tensorboard\]'"):
        logs.open_events(tmp_path)


def test_an_unexpected_fault_says_where_its_traceback_is(tmp_path):
    code = "from therapy_jax import run\ndef broken(config): raise ZeroDivisionError('nobody thought of this')\nrun.main(broken, '')"
    done = subprocess.run(
        [sys.executable, "-c", code, "--run_dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr
    assert "nobody thought of this" in (tmp_path / "error.log").read_text(encoding="utf-8")
    assert str(tmp_path / "error.log") in done.stdout


def test_what_begins_anew_does_not_add_up_its_time(tmp_path):
    for seconds in (10.0, 5.0):
        logs.note_environment(tmp_path, "ppo", seconds)
        logs.note_environment(tmp_path, "evaluate", seconds, went_on=False)
    noted = json.loads((tmp_path / "environment.json").read_text())
    assert (noted["ppo"]["seconds"], noted["evaluate"]["seconds"]) == (15.0, 5.0)


def test_a_line_separator_in_a_reply_splits_no_log_line(tmp_path):
    records = [{"stage": "ppo", "step": i, "reply": text} for i, text in enumerate(("a\u2028b", "c\u2029", "d\x85e"))]
    logs.append(tmp_path / "samples.jsonl", records)
    assert logs.read_log(tmp_path / "samples.jsonl") == records
    assert list(logs.take_up(tmp_path, "ppo", 1, "samples.jsonl")) == [0, 1]
    assert logs.read_log(tmp_path / "samples.jsonl") == records[:2]


def test_taking_up_a_stage_leaves_the_others_lines(tmp_path):
    logs.append(tmp_path / "metrics.jsonl", [{"stage": s, "step": k} for s in ("base", "sft") for k in (1, 2, 3)])
    assert list(logs.take_up(tmp_path, "sft", 1)) == [1]
    left = [(x["stage"], x["step"]) for x in logs.read_log(tmp_path / "metrics.jsonl")]
    assert left == [("base", 1), ("base", 2), ("base", 3), ("sft", 1)]


def test_a_stage_that_is_ended_early_leaves_its_time(tmp_path):
    """A signal or a refusal within an evaluation passes the end of the loop by."""
    began = time.monotonic() - 100
    for error in (Stopped("stopped by SIGTERM"), ConfigError("no such metric")):
        with pytest.raises(type(error)), logs.noting(tmp_path, "ppo", began):
            raise error
    with logs.noting(tmp_path, "sft", began):
        pass  # who comes to the end notes it there
    noted = json.loads((tmp_path / "environment.json").read_text())
    assert list(noted) == ["ppo"] and 200 <= noted["ppo"]["seconds"] < 250


def test_what_a_terminal_would_obey_is_shown_as_a_dot():
    assert run.escape("a\x1b]52;c;x\x07b\u202e [bold]c[/]\n\td") == "a·]52;c;x·b· \\[bold]c\\[/]\n\td"
