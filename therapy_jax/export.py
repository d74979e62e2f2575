"""What others need to run a model of ours: the prompt as a chat template, how to decode, and a card that says what it is.

The template is `prompts.encode_parts` once more, in Jinja, for programs that know Hugging Face's folders and not this
package; both must say the same, token for token. `user` is the client, `assistant` the therapist, the last message is the
client's, and the client's emotion is a variable. Two things a template cannot do: count tokens, so whoever calls it drops
the oldest messages; and encode a marker that somebody typed as plain characters, so it parts it by a space
("< |reply|>"): that forges nothing either, but those few tokens are not ours.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from therapy_jax import gpt2, origin, prompts, run, weights
from therapy_jax.card import Record, model_card
from therapy_jax.config import PromptConfig, SamplingConfig
from therapy_jax.dialogue import EMOTIONS
from therapy_jax.files import write_json

TEMPLATE = """\
{%- macro said(message) -%}
    {%- if message.content is not string -%}
        {{- raise_exception("the content of a message must be a text") -}}
    {%- endif -%}
    {%- set safe = namespace(text=message.content | trim) -%}
    {%- for marker in markers -%}
        {%- set safe.text = safe.text | replace(marker, marker[0] ~ " " ~ marker[1:]) -%}
    {%- endfor -%}
    {{- " " ~ safe.text -}}
{%- endmacro -%}
{%- for message in messages -%}
    {%- if message.role not in ["user", "assistant"] -%}
        {{- raise_exception("roles are user (the client) and assistant (the therapist); this model knows no other") -}}
    {%- elif with_context and not loop.last -%}
        {{- ("<|client|>" if message.role == "user" else "<|therapist|>") ~ said(message) -}}
    {%- endif -%}
{%- endfor -%}
{%- if messages[-1].role != "user" -%}
    {{- raise_exception("the last message must be the client's (role user)") -}}
{%- endif -%}
{{- "<|utterance|>" ~ said(messages[-1]) -}}
{%- if with_emotion and not inferred -%}
    {%- set felt = emotion if emotion is defined else usual or none -%}
    {%- if felt is not none and felt not in emotions -%}
        {{- raise_exception("emotion must be one of " ~ emotions | join(", ")) -}}
    {%- endif -%}
    {{- "<|emotion|> " ~ felt if felt is not none -}}
{%- endif -%}
{{- ("<|emotion|>" if inferred else "<|reply|>") if add_generation_prompt -}}
"""


def chat_template(tokenizer: Any, config: PromptConfig, emotions: Sequence[str] = EMOTIONS) -> str:
    """Jinja over messages [{role, content}] -> a text whose tokens are those of prompts.encode_prompt. Its variable
    `emotion` is the client's, one of those that the model has met: neutral where it is not given (left out, where the model has
    never met that), left out where it is none; without effect in prompts that hold no emotion, and with `emotion: inferred`,
    where the model writes it."""
    constants = {
        "markers": [token for token in dict.fromkeys(tokenizer.all_special_tokens) if len(token) > 1],
        "emotions": list(emotions),
        "usual": "neutral" if "neutral" in emotions else "",
        "with_context": "context" in config.format,
        "with_emotion": "emotion" in config.format,
        "inferred": config.emotion == "inferred",
    }
    lines = [f"{{%- set {k} = {json.dumps(v, ensure_ascii=False)} -%}}\n" for k, v in constants.items()]
    return "".join(lines) + TEMPLATE


def generation_config(config: gpt2.GPT2Config, decoding: SamplingConfig) -> dict[str, Any]:
    """generation_config.json: how the evaluation decodes, in Hugging Face's names (there top_k = 0 is off, as here)."""
    sampled = {"temperature": decoding.temperature, "top_k": decoding.top_k, "top_p": decoding.top_p}
    return {
        **{f"{name}_token_id": config.eos_token_id for name in ("bos", "eos", "pad")},
        "max_new_tokens": decoding.max_new_tokens,
        "do_sample": decoding.temperature > 0,
        **(sampled if decoding.temperature > 0 else {}),
    }


def write(out: Path, folder: Path, stage: str, record: Record) -> None:
    """folder/STAGE/model and what the run says about it -> out, a folder for others. The weights come last."""
    source = folder / stage / "model"
    config, params = weights.load_pretrained(source)
    tokenizer = prompts.load_tokenizer(source)
    noted = origin.read(source)
    emotions = noted["emotions"] if noted else EMOTIONS
    tokenizer.chat_template = chat_template(tokenizer, record.config.prompt, emotions)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_max_length = config.n_positions
    told = record.results.get("decoding")  # of one reply: what is done with several candidates is code, not weights
    decoding = run.decoding(record.config)
    decoding = SamplingConfig(**{f.name: told[f.name] for f in fields(decoding)}) if told else decoding

    out.mkdir(parents=True, exist_ok=True)
    for name in (
        "model.safetensors",
        "value_head.safetensors",
        origin.NAME,
    ):  # of an export before, maybe of another stage
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / "critic", ignore_errors=True)
    size = gpt2.count(params) - (config.padded_vocab_size - config.vocab_size) * config.n_embd
    card = model_card(folder.resolve().name, stage, record, config, size, decoding, emotions)
    (out / "README.md").write_text(card, encoding="utf-8")
    write_json(out / "generation_config.json", generation_config(config, decoding))
    if (source / "value_head.safetensors").is_file():
        shutil.copyfile(source / "value_head.safetensors", out / "value_head.safetensors")
    if (folder / stage / "critic").is_dir():
        shutil.copytree(folder / stage / "critic", out / "critic", dirs_exist_ok=True)
    if (source / origin.NAME).is_file():
        shutil.copyfile(source / origin.NAME, out / origin.NAME)
    tokenizer.save_pretrained(out)
    saved = (
        out / "tokenizer_config.json"
    )  # transformers does not save the side; prompts that go on are padded on the left
    write_json(saved, json.loads(saved.read_text(encoding="utf-8")) | {"padding_side": "left"})
    weights.save_pretrained(out, config, params)
