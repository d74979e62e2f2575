"""The model card of an export: what the model is, how it was made, how good it is beside trivial answers, and what it must
not be used for.

Every figure is read from the run; what the run does not hold is said to be missing. Names that come from a config or from
data are escaped, and nothing that was said in a conversation is quoted.
"""

from __future__ import annotations

import dataclasses
import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from therapy_jax import checkpoint, logs, origin
from therapy_jax import config as config_module
from therapy_jax.config import Config, ConfigError, DataConfig, SamplingConfig
from therapy_jax.dialogue import EMOTIONS
from therapy_jax.gpt2 import GPT2Config
from therapy_jax.results_table import ROWS, TRIVIAL

TAGS = "tags: [gpt2, therapy_jax, research-demo]"  # by this line a card of ours is known
STAGES = {
    "base": "as it was before fine-tuning: it has not learnt to answer anybody",
    "sft": "fine-tuned on therapists' replies (SFT)",
    "ppo": "fine-tuned on therapists' replies (SFT), then trained by PPO against a reward of several terms",
}


class Record(NamedTuple):
    """What a run wrote about itself, as far as it is there."""

    config: Config
    results: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]


def read_record(folder: Path, config: Config, stage: str) -> Record:
    """With the settings that the stage was trained with; `config` counts where the run does not tell them. Raises ConfigError
    where the two ask for different prompts, or a file cannot be read."""
    paths = (folder / stage / "model" / origin.SETTINGS, folder / "config.yaml")
    if path := next((path for path in paths if path.is_file()), None):
        own = config_module.load(path)
        if own.prompt != config.prompt:
            kept, asked = dataclasses.asdict(own.prompt), dataclasses.asdict(config.prompt)
            differing = ", ".join(f"prompt.{k} was {v}, now {asked[k]}" for k, v in kept.items() if v != asked[k])
            raise ConfigError(f"{folder}: trained with other prompts ({differing}); give --config {path}")
        config = own

    def read(name: str) -> Any:
        path = folder / name
        if name.endswith(".jsonl"):
            return logs.read_log(path)
        try:
            return json.loads(path.read_bytes() if path.is_file() else "{}")
        except ValueError as error:
            raise ConfigError(f"{path}: not valid JSON ({error})") from error

    return Record(config, *(read(name) for name in ("results.json", "environment.json", "metrics.jsonl")))


def escape(text: Any) -> str:
    """Any text -> Markdown that shows it as it is, on one line: no HTML, no Markdown, no link of its own."""
    shown = "".join(c for c in " ".join(str(text).split()) if c.isprintable())
    marked = re.sub(r"([\\`*_{}\[\]#|~:@$]|(?<!\d)\.|\.(?!\d))", r"\\\1", shown)
    return marked.translate({ord(c): html.escape(c) for c in "<>&\"'"})


def table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the head; the first column stands left, the others right."""
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|---" + "|---:" * (len(rows[0]) - 1) + "|", *body])


def named(data: DataConfig) -> str:
    """A data set by file name and format: its path would tell of the machine."""
    if data.path is None:
        return "the sample that ships with therapy_jax"
    return f"{escape(Path(data.path).name)} (format {data.format})"


def kept_policy(keep_best: str, logged: Sequence[dict[str, Any]]) -> list[str]:
    """Which iteration's policy it is, and by which figure of validation: as train_ppo.py chooses."""
    name, mode = keep_best.removeprefix("-"), "min" if keep_best.startswith("-") else "max"
    found = {line["step"]: line[f"validation/{name}"] for line in logged if f"validation/{name}" in line}
    if not found:
        return []
    step = checkpoint.best(list(found), found, mode)
    came = (
        f"the policy is that of iteration {step}" if step else "no iteration was better: the policy is the SFT model's"
    )
    return [f"validation {escape(name)} {found[min(found)]:.4f} before, {found[step]:.4f} at best; {came}"]


def training(record: Record, stage: str) -> str:
    """The stages up to this one: what was done, with which settings, when and on what."""
    config = record.config
    start = "from random weights" if config.model.name is None else f"from {escape(Path(config.model.name).name)}"
    done = {"base": [f"started {start}"]}
    if config.pretrain is not None:
        corpora = ", ".join(named(data) for data in config.pretrain.data)
        done["base"].append(f"{config.pretrain.epochs:g} epochs of language modelling on {corpora}")
    done["sft"] = [f"{config.sft.epochs:g} epochs on {named(config.data)}, batches of {config.sft.batch_size}"]
    ppo, weights = config.ppo, dataclasses.asdict(config.rewards.weights)
    if config.rewards.custom is not None:
        custom = config.rewards.custom
        weights |= {f"custom ({k})": v for k, v in (custom.weights or {Path(custom.path).name: 1.0}).items()}
    terms = ", ".join(f"{escape(name)} {weight:g}" for name, weight in weights.items() if weight)
    done["ppo"] = [
        f"{ppo.iterations} iterations of {ppo.batch_size} replies, {ppo.estimator}, KL coefficient {ppo.kl_coef:g}",
        f"reward: {terms}",
    ]
    lines = []
    for name in list(STAGES)[: list(STAGES).index(stage) + 1]:
        logged = [line for line in record.metrics if line["stage"] == name]
        losses = [line["validation_loss"] for line in logged if "validation_loss" in line]
        done[name] += [f"lowest validation loss {min(losses):.4f}"] if losses else []
        if name == "ppo":
            done[name] += kept_policy(ppo.keep_best, logged)
            if logged and logged[-1]["step"] < ppo.iterations:
                done[name].append(f"it ended after {logged[-1]['step']} of them")
        if alarms := [line for line in logged if "alarm" in line]:
            done[name].append(f"**alarms: {len(alarms)}**, the last one: {escape(alarms[-1]['alarm'])}")
        if was := record.environment.get(name):
            done[name].append(
                f"{was['seconds'] / 60:.1f} min on {escape(was['devices'])}, jax {escape(was['jax'])}, commit {escape(was['commit'])}"
            )
        lines.append(f"- **{name}**: " + "; ".join(done[name]))
    if not record.environment:
        lines.append("- Missing: when, on what and with which versions (the run has no environment.json).")
    if not record.metrics:
        lines.append("- Missing: how training went (the run has no metrics.jsonl).")
    return "\n".join(lines)


def figures(record: Record, stage: str) -> str:
    """The table of results.json, this model's column first, and its differences to the others."""
    results, environment = record.results, record.environment
    if stage not in results.get("systems", {}):
        what = "results.json has no row for it" if results else "the run has no results.json"
        return f"**Not evaluated**: {what}. Nothing is known about how good this model is; scripts/evaluate.py says it."
    data, systems = results["data"], results["systems"]
    order = [stage, *(name for name in systems if name != stage)]
    rows = [["", *(f"**{name}**" if name == stage else escape(name) for name in order)]]
    for key, label in ROWS.items():
        if any(systems[name].get(key) is not None for name in order):
            digits = 1 if key in ("perplexity", "reply_perplexity", "reply_words") else 4
            cells = [systems[name].get(key) for name in order]
            rows.append([escape(label), *("" if cell is None else f"{cell:.{digits}f}" for cell in cells)])
    told = results.get("decoding", {})
    decoding = ", ".join(f"{escape(k)} {v:g}" for k, v in told.items())
    if told.get("candidates", 1) > 1:  # that is code: who loads this folder has one sample
        decoding += f"; a model's answer is the one of {told['candidates']} samples that the others agree with most, not a single sample"
    trivial = "".join(f"`{name}` is {what}. " for name, what in TRIVIAL.items() if name in systems)
    parts = [
        f"{data['n']} exchanges of the {escape(data['split'])} split (format {escape(data['name'])}, sha256 of the data "
        f"`{re.sub('[^0-9a-f]', '', data['sha256'])[:16]}`). {trivial}Decoding: {decoding}.",
        table(rows),
    ]
    if (majority := results.get("emotion_majority_accuracy")) is not None:
        parts.append(f"Always naming the commonest emotion has a stated accuracy of {majority:.4f}.")
    versus = {
        k.removeprefix(f"{stage} - "): v
        for k, v in results.get("comparisons", {}).items()
        if k.startswith(f"{stage} - ")
    }
    if versus:
        keys = list(next(iter(versus.values())))
        rows = [["this model minus", *(ROWS.get(key, escape(key)) for key in keys)]]
        for other, found in versus.items():
            rows.append([escape(other), *("{:+.4f} [{:+.4f}, {:+.4f}]".format(*found[key]) for key in keys)])
        parts += ["Differences, with 95 % intervals by paired bootstrap over exchanges (not over seeds):", table(rows)]
    parts.append(f"Signature: {escape(results.get('signature', 'none'))}")
    finished = [environment.get(name, {}).get("finished", "") for name in ("evaluate", stage)]
    if all(finished) and finished[0] < finished[1]:
        parts.append(
            "**These figures are older than the weights**: the model was trained further after its evaluation."
        )
    return "\n\n".join(parts)


def reading(config: Config, model: GPT2Config, emotions: Sequence[str]) -> str:
    """What goes in and what comes out, as bullets."""
    prompt = config.prompt
    parts = ["the client's last message"]
    parts += ["earlier turns"] if "context" in prompt.format else []
    parts += ["the client's emotion"] if "emotion" in prompt.format else []
    emotion = (
        f"`emotion`, a variable of the template, is one of {', '.join(map(escape, emotions))}; "
        + ("`neutral` where it is not given." if "neutral" in emotions else "left out where it is not given.")
        if emotions
        else "No emotion was annotated in its training data: the template puts none into the prompt."
    )
    if prompt.emotion == "inferred":
        emotion = "The model writes the client's emotion itself, then `<|reply|>`, before the reply."
    lines = [
        f"Roles: `user` is the client, `assistant` the therapist. The model reads {', '.join(parts)}; there is no system prompt.",
        *([emotion] if "emotion" in prompt.format else []),
        f"In training the oldest turns were left out until a prompt fitted in {prompt.max_tokens} tokens. A template cannot "
        f"count: leave them out yourself, and never exceed {model.n_positions} tokens in all.",
        "The reply is an emotion, `<|text|>`, and the text. A server that hides special tokens shows the emotion as the "
        "first word: take it off before you show the reply or send it back as an earlier turn.",
        "A marker that somebody types (`<|reply|>`) is parted by a space, so that no text can forge one.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def model_card(
    name: str, stage: str, record: Record, model: GPT2Config, parameters: int, decoding: SamplingConfig,
    emotions: Sequence[str] = EMOTIONS,
) -> str:  # fmt: skip
    """README.md of the export: Markdown behind the few lines of YAML that the hub reads."""
    config = record.config
    given = bool(emotions) and "emotion" in config.prompt.format and config.prompt.emotion == "given"
    such = "sadness" if "sadness" in emotions else escape(emotions[0]) if emotions else ""
    felt = f', emotion="{such}"' if given else ""
    posted = f' The emotion goes into `chat_template_kwargs`: `{{"emotion": "{such}"}}`.' if given else ""
    longest = decoding.max_new_tokens
    cleaned = ", cleaned" if config.data.clean else ""
    started = "" if config.model.name is None else " and of the weights that it started from"
    critic = "`value_head.safetensors` is the critic's last layer, for going on with PPO"
    critic += "; `critic/` is the model under it" if config.ppo.value_head == "separate" else ""
    critic += "" if config.ppo.estimator == "gae" else f" ({config.ppo.estimator} has no critic: it is untrained)"
    return f"""\
---
library_name: transformers
pipeline_tag: text-generation
{TAGS}
---

# {escape(name)}, {stage}

A GPT-2 of {parameters:,} parameters ({model.n_layer} layers, width {model.n_embd}) that answers a client as a therapist
might, {STAGES[stage]}.
Trained with therapy_jax after *Context-Emotion Aware Therapeutic Dialogue Generation* (Zhang & Ive, arXiv 2511.11884).

> **A research demo, not care.** It is no therapist and must not be used as one. In danger, call your local emergency
> number or a crisis line: a person can help, this model cannot. **Nothing in this folder notices a crisis**: the
> disclosure and a gate before the model are code, not weights, and whoever serves it must put them there.

## How to run it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # where this file is
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
messages = [{{"role": "user", "content": "I can't sleep since she left."}}]
prompt = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"{felt}
)
reply = model.generate(**prompt)[0, prompt["input_ids"].shape[1] :]
print(tokenizer.decode(reply))
```

Over the OpenAI protocol: `transformers serve`, then `model` = this folder and `max_tokens` = {longest} in each request.
Without `max_tokens` that server (transformers 5.23) asks for 1,024 tokens; the model has {model.n_positions} positions.{posted}

{reading(config, model, emotions)}

## Data

- {named(config.data)}, split by conversation{cleaned}
- The licence of these weights depends on that of the data{started}; none is claimed here.

## Training

{training(record, stage)}

{critic + "." if stage == "ppo" else ""}

## How good it is

{figures(record, stage)}

## Intended use

Research and teaching: how supervised fine-tuning and PPO shape a small language model, and how far its figures are from
trivial answers. Out of scope: anybody's care, triage, diagnosis or advice, and any use in which somebody may take it for a person.

## Limits and risks

- It has no knowledge of the world or of medicine that could be relied on, and may contradict or invent what was said.
- Word overlap with a therapist's reply and an emotion label are no measure of help. A reward can be gamed: read replies,
  and the rows on variety, length and emotion as well.
- It may encourage harm, judge, or miss what matters. It was not tested with people.
- It repeats the biases of its data, and may repeat phrases of the conversations that it was trained on.
- It reads one language, that of its data, and emotions as {len(emotions) or "no"} words.
"""
