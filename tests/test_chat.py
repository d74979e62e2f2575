"""The chat as a person has it: a real process on a trained run, lines in, text out."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from therapy_jax import safety
from therapy_jax.config import Config

ROOT = Path(__file__).parent.parent
ENV = {**os.environ, "XLA_FLAGS": "", "COLUMNS": "100", "PYTHONIOENCODING": "utf-8"}


def command(folder: Path, *overrides: str) -> list[str]:
    return [sys.executable, "scripts/chat.py", "--config", str(folder / "config.yaml"), *overrides]


def chat(folder: Path, lines: list[str], *overrides: str) -> subprocess.CompletedProcess:
    text = "".join(line + "\n" for line in lines)
    return subprocess.run(
        command(folder, *overrides), cwd=ROOT, env=ENV, input=text, capture_output=True, text=True, timeout=600
    )


def flat(text: str) -> str:
    """Without the frames and the line breaks of the terminal."""
    return " ".join(text.replace("│", " ").split())


def turns(out: str) -> list[str]:
    """What stands between one `you >` and the next, what comes before the first included."""
    return [flat(part) for part in out.split("you > ")]


@pytest.mark.slow
def test_a_conversation(tiny_run, tmp_path):
    saved = tmp_path / "said.json"
    said = [
        "I can't sleep since my [b]mother[/b] died.",
        "/emotion sadnes",
        "/emotion sadness",
        "/compare sft ppo",
        "/comapre",
        "/compare gpt",
        "I want to kill myself.",
        "/emotion joy",
        "It rained all day here, so I stayed in and read.",
        f"/save {saved}",
        f"/save {saved}",
        "/reset",
        "/emotion joy",
        "/help",
    ]
    done = chat(tiny_run, said)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    before, first, unknown_emotion, corrected, compared, typo, unknown_model, crisis, refused, *rest = turns(
        done.stdout
    )
    thanks, written, exists, forgotten, nothing, helped = rest

    assert flat(safety.DISCLOSURE) in before and "compiling" in before
    assert done.stdout.index("Before you start") < done.stdout.index("compiling")
    assert "my [b]mother[/b] died. you: " in first and "sure (/emotion corrects it) ppo >" in first
    assert "do you mean sadness?" in unknown_emotion
    assert "you: sadness, as you say" in corrected and "ppo >" in corrected
    assert "you: sadness, as you say" in compared and " sft ppo " in compared
    assert "there is no /comapre; do you mean /compare?" in typo
    assert "/compare takes models" in unknown_model and "base, sft, ppo" in unknown_model
    assert (
        flat(safety.answer("suicide", Config().safety)) in crisis and " sft ppo" not in crisis and "you: " not in crisis
    )
    assert "a message that a model has answered" in refused
    assert " sft ppo " in thanks
    assert f"saved: {saved}" in written and "is left as it is" in exists
    assert "forgotten" in forgotten and "a message that a model has answered" in nothing
    assert all(word in helped for word in ("/emotion", "/compare", "/reset", "/save", "/quit", "base, sft, ppo"))
    assert helped.endswith("is forgotten.")  # the end of the input is a way to leave

    kept = json.loads(saved.read_text(encoding="utf-8"))
    assert kept["disclosure"] == safety.DISCLOSURE
    assert kept["models"] == {name: str(tiny_run / name / "model") for name in ("sft", "ppo")}
    one, two, three = kept["conversation"]
    assert one["client"] == said[0] and one["emotion"] == "sadness" and one["crisis"] is None
    assert [a["model"] for a in one["answers"]] == ["sft", "ppo"] == [a["model"] for a in three["answers"]]
    assert (
        two["crisis"] == "suicide"
        and two["answers"] == []
        and two["fixed_answer"] == safety.answer("suicide", Config().safety)
    )
    assert flat(one["answers"][1]["text"])[:30] in compared.replace("  ", " ") or len(one["answers"][1]["text"]) > 30


@pytest.mark.slow
def test_a_model_that_writes_the_emotion_itself_and_one_that_is_told_none(tiny_run, tmp_path):
    """The same weights under other prompts: what counts is that each way of asking works, and what is shown."""
    for changes, shown, correctable in (
        ({"emotion": "inferred"}, "you: ", "as you say"),
        ({"format": "context"}, "ppo >", "this model is told no emotion (prompt.format: context)"),
    ):
        folder = tmp_path / "_".join(changes)
        folder.mkdir()
        (folder / "ppo").symlink_to(tiny_run / "ppo")
        text = (tiny_run / "config.yaml").read_text().replace(str(tiny_run), str(folder))
        for key, value in changes.items():
            old = {"emotion": "emotion: given", "format": "format: context_emotion"}[key]
            assert text.count(old) == 1
            text = text.replace(old, f"{key}: {value}")
        (folder / "config.yaml").write_text(text)
        done = chat(folder, ["Hello there.", "/emotion anger", "/quit", "never said"])
        assert done.returncode == 0, done.stdout + done.stderr
        _, hello, emotion, bye = turns(done.stdout)
        assert shown in hello and "ppo >" in hello and correctable in emotion
        assert bye.startswith("/quit Goodbye")


@pytest.mark.slow
def test_ctrl_c_leaves_without_a_traceback(tiny_run):
    with subprocess.Popen(
        command(tiny_run), cwd=ROOT, env=ENV, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stdin is not None
        for line in process.stdout:
            if line.startswith("ready"):
                break
        process.send_signal(signal.SIGINT)  # while it waits for a line
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "Goodbye" in out and err == ""


@pytest.mark.slow
def test_a_mistake_is_one_sentence(tiny_run, tmp_path):
    for args, named in (
        (["--run_dir", str(tmp_path)], "no trained model here; run scripts/train_sft.py"),
        (["--prompt.max_tokens", "64"], "prompt.max_tokens was 96 when"),
    ):
        done = chat(tiny_run, ["Hello."], *args)
        assert done.returncode == 2 and named in flat(done.stdout) and "Traceback" not in done.stderr
        assert flat(safety.DISCLOSURE) in flat(done.stdout)
    assert not list(tmp_path.iterdir())  # a folder that is only talked to is not written to


def test_help_needs_no_jax():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "scripts/chat.py", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "/help lists the commands" in flat(done.stdout)
    assert "jsonargparse" in done.stderr and not [line for line in done.stderr.splitlines() if line.endswith("| jax")]
