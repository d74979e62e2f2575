"""Many calls to an OpenAI-compatible endpoint: a few at a time, each tried again where that may help, each answer kept.

Answers go to a JSON Lines file as they come, by the name of their call; what stands there is not asked again, so that a
stop loses nothing. The key is taken from the environment and goes to the endpoint alone: into no file, log or message.
"""

from __future__ import annotations

import json
import os
import random
import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from therapy_jax.config import ConfigError, JudgeConfig

GIVE_UP = 10  # calls in a row without an answer after which the endpoint is taken to be down


class Answer(NamedTuple):
    text: str
    model: str  # as the endpoint names what answered


def read_key(cfg: JudgeConfig) -> str | None:
    """The endpoint's key from the environment. Raises ConfigError, without the key, where it is unset or malformed."""
    if cfg.key_env is None:
        return None
    key = os.environ.get(cfg.key_env, "").strip()
    if not key:
        raise ConfigError(f"judge.key_env: the environment variable {cfg.key_env} is not set; export it first")
    if not re.fullmatch(r"[A-Za-z0-9._~+/:=-]+", key):  # what a Bearer token may hold (RFC 6750), and ":"
        raise ConfigError(f"judge.key_env: {cfg.key_env} holds characters that no key has; set it anew, without quotes")
    return key


def import_openai() -> Any:
    try:
        import openai  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError('the judge needs the openai client, the extra `judge`: pip install -e ".[judge]"') from None
    return openai


def ask(
    bodies: Mapping[str, dict[str, Any]], cfg: JudgeConfig, key: str | None, seed: int, cache: Path,
    advance: Callable[..., None], notes: Mapping[str, dict[str, Any]] | None = None,
) -> dict[str, Answer]:  # fmt: skip
    """Chat completions by name, made in an order shuffled by `seed` -> their answers; a call that got none is left out.

    cache    the JSON Lines file; `notes` by name are written beside the answers, for whoever reads it.
    advance  is called with the number of calls done, and unanswered=.
    Raises ConfigError, which never holds the key, where the endpoint refuses or GIVE_UP calls in a row got no answer."""
    openai = import_openai()
    answers = {name: answer for name, answer in _read(cache).items() if name in bodies}
    order = list(bodies)
    random.Random(seed).shuffle(order)
    order = [name for name in order if name not in answers]
    before = len(answers)
    if before:
        advance(before)
    lock = threading.Lock()

    def call(name: str) -> str | None:
        """Ask, and write the answer down -> what went wrong, if anything did."""
        try:
            completion = client.chat.completions.create(**bodies[name])
            said = (completion.choices[0].message.content, getattr(completion, "model", None))
        except Exception as error:  # a network may bring anything; the other calls go on
            return _problem(error, openai, cfg, key)
        answer = Answer(*(_without(key, text) if isinstance(text, str) else "" for text in said))
        line = {"call": name, **answer._asdict(), **(notes or {}).get(name, {})}
        with lock:
            answers[name] = answer
            file.write(json.dumps(line) + "\n")
            file.flush()

    url, tries = cfg.base_url, cfg.max_retries
    with (
        cache.open("a", encoding="utf-8") as file,
        openai.OpenAI(base_url=url, api_key=key or "none", timeout=cfg.timeout, max_retries=tries) as client,
    ):
        pool = ThreadPoolExecutor(cfg.concurrency)
        try:
            unanswered = in_a_row = 0
            for done, future in enumerate(as_completed([pool.submit(call, name) for name in order]), 1):
                problem = future.result()
                unanswered, in_a_row = (unanswered, 0) if problem is None else (unanswered + 1, in_a_row + 1)
                if problem is not None and (in_a_row == GIVE_UP or unanswered == len(order)):
                    raise ConfigError(
                        f"the judge at {url} {problem} ({in_a_row} calls in a row); {len(answers)} answers are kept, and the "
                        "same command asks for the rest"
                    )
                advance(before + done, unanswered=unanswered)
        finally:  # a stop waits for the calls under way: their answers are written down, too
            pool.shutdown(cancel_futures=True)
    return answers


def _problem(error: Exception, openai: Any, cfg: JudgeConfig, key: str | None) -> str:
    """What went wrong with a call, as the end of a sentence. Raises ConfigError where no other call can fare better."""
    if isinstance(error, openai.APITimeoutError):
        return f"did not answer within {cfg.timeout:g} s"
    if isinstance(error, openai.APIConnectionError):
        return f"cannot be reached ({_without(key, str(error.__cause__ or error))})"
    status = getattr(error, "status_code", None)
    if not isinstance(error, openai.APIStatusError):
        return f"sent what is not of the OpenAI protocol ({type(error).__name__})"
    if status == 401:  # what a server says beside it may quote the key, in part
        named = f"the key in {cfg.key_env}" if cfg.key_env else "a call without key; name its variable by judge.key_env"
        raise ConfigError(f"the judge at {cfg.base_url} refuses {named} (status 401)") from None
    if status == 404:
        raise ConfigError(
            f"the judge at {cfg.base_url} knows no model {cfg.model}, or no chat completions (status 404); see judge.model "
            "and judge.base_url, which often ends in /v1"
        ) from None
    said = "" if status == 403 else ": " + " ".join(_without(key, str(error)).split())[:200]
    return f"answers with status {status}{said}"


def _without(key: str | None, text: str) -> str:
    """A server may quote the key. Stand-ins such as `none` or `EMPTY` are no secret, and may be words."""
    return text.replace(key, "[key]") if key and len(key) >= 8 else text


def _read(cache: Path) -> dict[str, Answer]:
    """The answers that are kept; a line that a kill cut short is dropped from the file."""
    raw = cache.read_bytes() if cache.is_file() else b""
    whole = raw[: raw.rfind(b"\n") + 1]
    if whole != raw:
        os.truncate(cache, len(whole))
    try:
        lines = [json.loads(line) for line in whole.decode("utf-8").split("\n") if line]
        return {line["call"]: Answer(line["text"], line["model"]) for line in lines}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{cache} holds a line that is none of ours ({error}); delete it to ask all anew") from None
