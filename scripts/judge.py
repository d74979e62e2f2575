"""An LLM rates the replies that evaluate.py left (answers.json) -> results.json, under "judge", and a table. It is reached
over the OpenAI protocol; what it rates is sent to judge.base_url."""

import json
import random
from pathlib import Path
from typing import Any

from therapy_jax import endpoint, files, judge, run
from therapy_jax.config import Config, ConfigError
from therapy_jax.dialogue import Exchange, exchanges
from therapy_jax.run import console, escape


def main(config: Config) -> None:
    cfg = config.judge
    for name in ("base_url", "model"):
        if getattr(cfg, name) is None:
            raise ConfigError(f"judge.{name} is not set: an OpenAI-compatible endpoint is needed, see --help")
    endpoint.import_openai()
    key = endpoint.read_key(cfg)
    folder = files.as_path(config.run_dir)
    answers, results = (read(folder / name) for name in ("answers.json", "results.json"))
    chosen = exchanges_of(config, answers, folder / "answers.json")
    replies = replies_of(answers, results, cfg.systems, folder)

    at = range(len(chosen))
    if cfg.limit is not None and cfg.limit < len(chosen):
        at = sorted(random.Random(config.seed).sample(at, cfg.limit))
    systems = {
        name: [judge.items_of(chosen[i], texts[i], cfg.context_turns) for i in at] for name, texts in replies.items()
    }
    items = [item for rows in systems.values() for row in rows for item in row]
    items += [item for planted in judge.planted().values() for item in planted]
    total = cfg.repeats * len(set(items))
    console.print(
        f"judge: {escape(cfg.model or '')} at {escape(cfg.base_url or '')} reads {len(at)} conversations and the replies of "
        f"{escape(', '.join(systems))}: {total:,} calls, less those already in {escape(str(folder / 'judge.jsonl'))}"
    )
    with run.progress("judge", total, at_first="asking ...") as advance:
        given = judge.ask(items, cfg, key, config.seed, folder, advance)
    judged = judge.report(systems, given, cfg, resamples=config.evaluate.bootstrap, seed=config.seed)
    files.write_json(folder / "results.json", {**read(folder / "results.json"), "judge": judged})

    console.print(judge.table(judged))
    for name, differences in judged["comparisons"].items():
        shown = ", ".join(
            f"{k} {d:+.2f} [{low:+.2f}, {high:+.2f}]" for k, (d, low, high) in differences.items() if d is not None
        )
        console.print(escape(f"{name}: {shown}"))
    if judged["unanswered"]:
        console.print(f"{judged['unanswered']} calls got no answer; the same command asks for them again")
    if judged["fit"]:
        console.print("the judge is fit: it told the planted replies, good and bad, apart")
    else:
        console.print("[bold red]the judge is UNFIT[/], and its figures say nothing:")
        for reason in judged["unfit_because"]:
            console.print(f"  {escape(reason)}")
    console.print(f"written: {escape(str(folder / 'results.json'))}")


def read(path: Path) -> Any:
    """A file that evaluate.py leaves."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path} is missing; run scripts/evaluate.py with the same --config and --run_dir first"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); run scripts/evaluate.py again") from None


def exchanges_of(config: Config, answers: list[dict[str, str]], path: Path) -> list[Exchange]:
    """The exchanges that were answered, with the turns before them. Raises ConfigError where the data is not that."""
    data = run.read_data(config.data, config.seed)
    known = (e for dialogue in data[config.evaluate.split] for e in exchanges(dialogue))  # some may have been left out
    with_context = "context" in answers[0] if answers else False  # an older evaluation left none

    def told(e: Exchange) -> tuple:
        context = [{"speaker": turn.speaker, "text": turn.text} for turn in e.context]
        return context if with_context else None, e.client.text, e.therapist.text

    found = (
        next((e for e in known if told(e) == tuple(a.get(k) for k in ("context", "client", "therapist"))), None)
        for a in answers
    )
    chosen = [e for e in found if e is not None]
    if len(chosen) < len(answers):
        raise ConfigError(
            f"{path} does not answer the exchanges of this config; give the run's own: --config {path.parent / 'config.yaml'}"
        )
    if not chosen:
        raise ConfigError(f"{path} answers nothing; run scripts/evaluate.py again")
    return chosen


def replies_of(
    answers: list[dict[str, str]], results: dict[str, Any], wanted: list[str] | None, folder: Path
) -> dict[str, list[str]]:
    """{system: replies}: those of answers.json, the constant one that is best by ROUGE-L, and the person's own."""
    found = {name: [a[name] for a in answers] for name in answers[0] if name not in ("context", "client")}
    if constant := results.get("constants", {}).get("rougeL"):
        found["constant"] = [constant] * len(answers)
    found["therapist"] = found.pop("therapist")  # last in the table
    for name in wanted or ():
        if name not in found:
            raise ConfigError(f"judge.systems: {folder / 'answers.json'} has no {name}; it has {', '.join(found)}")
    return {name: texts for name, texts in found.items() if wanted is None or name in wanted}


if __name__ == "__main__":
    run.main(main, __doc__)
