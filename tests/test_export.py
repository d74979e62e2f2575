"""Handing a model on: others' programs must read, prompt and run it as we do; the card must say what the run says."""

import dataclasses
import functools
import importlib
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from therapy_jax import (
    card,
    checkpoint,
    config,
    dialogue,
    export,
    gpt2,
    locate,
    origin,
    ppo,
    prompts,
    sampling,
    sft,
    weights,
)
from therapy_jax.batching import prompts as batch_of
from therapy_jax.config import Config, ConfigError, DataConfig, PromptConfig, RewardConfig, SamplingConfig
from therapy_jax.dialogue import EMOTIONS, Turn
from therapy_jax.rewards.combine import init_stats

ROOT = Path(__file__).resolve().parent.parent
FORMATS = [PromptConfig(format=f, max_tokens=10_000) for f in ("utterance", "context", "emotion", "context_emotion")]
FORMATS += [PromptConfig(format=f, emotion="inferred", max_tokens=10_000) for f in ("emotion", "context_emotion")]
NAMES = [f"{f.format}-{f.emotion}" for f in FORMATS]
CONFIG = Config(prompt=PromptConfig(max_tokens=96), ppo=config.PPOConfig(value_head="separate"))
GREEDY = SamplingConfig(max_new_tokens=12, temperature=0.0)


def random_params(model: gpt2.GPT2Config, seed: int) -> gpt2.Params:
    """Large weights, so that replies vary and no two tokens are nearly as likely."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: gpt2.init(model, jax.random.key(0)))
    made = jax.tree.map(lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), shapes)
    made["wte"][model.vocab_size :] = 0  # as a folder gives them back
    return made


def write_run(folder: Path, tokenizer, cfg: Config) -> dict[str, gpt2.Params]:
    """A run folder as the scripts leave it, random models and real checkpoints in it -> {stage, stage/step: params}."""
    sizes = {"vocab_size": len(tokenizer), "n_positions": 192, "n_embd": 16, "n_layer": 2, "n_head": 2}
    sizes["eos_token_id"] = tokenizer.eos_token_id
    model = gpt2.GPT2Config(**sizes)

    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml(cfg), encoding="utf-8")
    made = {}
    for i, stage in enumerate(("base", "sft", "ppo")):
        made[stage] = random_params(model, i)
        weights.save_pretrained(folder / stage / "model", model, made[stage], tokenizer)
        origin.note(folder / stage / "model", cfg, dialogue.read_dialogues(None, "jsonl")["train"])
    head = {"value.kernel": np.ones((16, 1), np.float32), "value.bias": np.zeros(1, np.float32)}
    save_file(head, folder / "ppo" / "model" / "value_head.safetensors")

    weights.save_pretrained(folder / "ppo" / "critic", model, made["base"], tokenizer)

    sft_tx, ppo_tx = sft.optimizer(cfg.sft, 4), ppo.optimizer(cfg.ppo)
    for stage, steps in (("base", (4,)), ("sft", (4, 8)), ("ppo", (8, 10))):  # 8 < 10: by number, not by name
        with checkpoint.manager(folder / stage / "checkpoints", "min", {}) as manager:
            for step in steps:
                made[f"{stage}/{step}"] = new = random_params(model, 100 + step + len(stage))
                state = sft.init_state(new, sft_tx)
                if stage == "ppo":
                    state = ppo.init_state(new, model, ppo_tx, cfg.ppo, init_stats(["rouge_l"]))
                checkpoint.save(manager, step, state, {"stage": stage})
    return made


@pytest.fixture(scope="module")
def tokenizer():
    texts = [f" {turn.text}" for part in dialogue.read(None, "jsonl").values() for e in part for turn in e.context[:2]]
    made = prompts.train_tokenizer(texts, vocab_size=400)
    prompts.add_special_tokens(made)
    return made


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, tokenizer):
    """-> (a run folder, its parameters)."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    return folder, write_run(folder, tokenizer, CONFIG)


@pytest.fixture(scope="module")
def exported(run_folder, tmp_path_factory):
    """What export_hf.py writes of it, greedy decoding; nothing but the script's own function, so without a process."""
    folder, _ = run_folder
    out = tmp_path_factory.mktemp("out") / "model"
    decoding = {"max_new_tokens": 12, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "candidates": 1, "draws": 1}
    record = card.read_record(folder, CONFIG, "ppo")
    export.write(out, folder, "ppo", record._replace(results={"decoding": decoding}))
    return out


# ---- the chat template, against prompts.encode_prompt


@pytest.fixture(scope="module")
def templated(tokenizer, tmp_path_factory):
    """{format: the tokenizer of an export, as AutoTokenizer reads it}."""
    pytest.importorskip("jinja2")
    transformers = pytest.importorskip("transformers")

    @functools.cache
    def of(prompt: PromptConfig, emotions=dialogue.EMOTIONS):
        folder = tmp_path_factory.mktemp("tokenizer")
        tokenizer.chat_template = export.chat_template(tokenizer, prompt, emotions)
        tokenizer.save_pretrained(folder)
        tokenizer.chat_template = None
        return transformers.AutoTokenizer.from_pretrained(folder)

    return of


def messages(context, client) -> list[dict[str, str]]:
    roles = {"client": "user", "therapist": "assistant"}
    return [{"role": roles[turn.speaker], "content": turn.text} for turn in (*context, client)]


def ids_of(theirs, context, client, **variables) -> list[int]:
    asked = messages(context, client)
    return theirs.apply_chat_template(asked, add_generation_prompt=True, return_dict=True, **variables)["input_ids"]


@pytest.mark.parametrize(("emotion", "known"), [(None, ()), ("afraid", dialogue.EMPATHETIC_EMOTIONS)])
def test_a_model_is_told_the_emotions_that_it_has_met_and_no_other(templated, tokenizer, emotion, known):
    """Data without emotions has no marker of them, and EmpatheticDialogues has words of its own."""
    prompt = PromptConfig()
    theirs, client = templated(prompt, known), Turn("client", "It rained.", emotion)
    variables = {} if emotion is None else {"emotion": emotion}
    assert ids_of(theirs, (), client, **variables) == prompts.encode_prompt(tokenizer, (), client, prompt)[0]
    with pytest.raises(Exception, match="emotion must be one of"):
        ids_of(theirs, (), client, emotion="sadness")


@pytest.mark.parametrize("prompt", FORMATS, ids=NAMES)
def test_template_gives_our_tokens(tokenizer, templated, prompt):
    theirs = templated(prompt)
    exchanges = [e for part in dialogue.read(None, "jsonl").values() for e in part][::3]
    assert len(exchanges) > 250 and {len(e.context) for e in exchanges} >= {0, 2, 4}
    for e in exchanges:
        ours, dropped = prompts.encode_prompt(tokenizer, e.context, e.client, prompt)
        assert dropped == 0 and ids_of(theirs, e.context, e.client, emotion=e.client.emotion) == ours


def test_template_of_gpt2s_own_tokenizer(shared_data, tmp_path):
    pytest.importorskip("jinja2")
    transformers = pytest.importorskip("transformers")
    ours = prompts.load_tokenizer(shared_data / "gpt2_tokenizer")
    prompts.add_special_tokens(ours)
    ours.chat_template = export.chat_template(ours, FORMATS[3])
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for e in dialogue.read(None, "jsonl")["test"][:40]:
        wanted = prompts.encode_prompt(ours, e.context, e.client, FORMATS[3])[0]
        assert ids_of(theirs, e.context, e.client, emotion=e.client.emotion) == wanted


ODD = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
LOADED = st.sampled_from(
    [
        "{{ 7 * 7 }}",
        "{% for x in y %}",
        "{# no #}",
        "<b>&amp;</b>",
        "**",
        "\\n",
        "\n\t",
        "\u00a0x\u2003",
        "'\"",
        "😀‍",
        "<|",
        "|>",
    ]
)
TYPED = st.sampled_from(["<|reply|>", "<|endoftext|>", "<|client|>", "<|cli<|reply|>ent|>", "<|reply|><|text|>"])
speakers = st.sampled_from(["client", "therapist"])
plain = st.lists(ODD | LOADED, max_size=4).map("".join).filter(lambda t: not re.search(r"<\|\w+\|>", t))
forged = st.lists(ODD | LOADED | TYPED, max_size=4).map("".join)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.builds(Turn, speakers, plain), max_size=3), plain, st.sampled_from(EMOTIONS), st.sampled_from(FORMATS)
)
def test_template_of_any_text(tokenizer, templated, context, text, emotion, prompt):
    client = Turn("client", text, emotion)
    ours, _ = prompts.encode_prompt(tokenizer, context, client, prompt)
    assert ids_of(templated(prompt), context, client, emotion=emotion) == ours


@settings(max_examples=150, deadline=None)
@given(st.lists(st.builds(Turn, speakers, forged), max_size=3), forged)
def test_no_text_forges_a_marker(tokenizer, templated, context, text):
    """A typed marker is parted by a space: other tokens than ours, and as little a marker."""
    prompt, client = FORMATS[3], Turn("client", text, "joy")
    found = ids_of(templated(prompt), context, client, emotion="joy")
    special = set(tokenizer.all_special_ids)
    markers = [i for i in found if i in special]
    ours = [i for i in prompts.encode_prompt(tokenizer, context, client, prompt)[0] if i in special]
    assert markers == ours  # no more of them than the template's own, in its order
    heard = tokenizer.decode(found[found.index(tokenizer.convert_tokens_to_ids("<|utterance|>")) + 1 :])
    assert heard.removesuffix("<|emotion|> joy<|reply|>").replace("< |", "<|") == f" {text.strip()}".replace(
        "< |", "<|"
    )


def test_emotion_of_the_template(tokenizer, templated):
    from jinja2.exceptions import TemplateError

    theirs, client = templated(FORMATS[3]), Turn("client", "She left.")
    for variables, emotion in (({}, "neutral"), ({"emotion": None}, None), ({"emotion": "fear"}, "fear")):
        ours, _ = prompts.encode_prompt(tokenizer, (), Turn("client", "She left.", emotion), FORMATS[3])
        assert ids_of(theirs, (), client, **variables) == ours
    for emotion in ("happy", "<|reply|> joy", ""):
        with pytest.raises(TemplateError, match="emotion must be one of neutral, depression, anger"):
            ids_of(theirs, (), client, emotion=emotion)
    whole, start = (
        theirs.apply_chat_template(messages((), client), tokenize=False, add_generation_prompt=ask)
        for ask in (True, False)
    )
    assert (whole, start) == ("<|utterance|> She left.<|emotion|> neutral<|reply|>", whole.removesuffix("<|reply|>"))


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
            "the last message must be the client's",
        ),
        ([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], "roles are user .* and assistant"),
        ([{"role": "user", "content": [{"type": "text", "text": "a"}]}], "the content of a message must be a text"),
        ([{"role": "user", "content": None}], "the content of a message must be a text"),
    ],
)
def test_template_refuses(templated, asked, sentence):
    from jinja2.exceptions import TemplateError

    for prompt in FORMATS:
        with pytest.raises(TemplateError, match=sentence):
            templated(prompt).apply_chat_template(asked, add_generation_prompt=True, tokenize=False)


# ---- the folder, read by torch


def ours_greedy(folder: Path, ids: list[int]) -> list[int]:
    model, params = weights.load_pretrained(folder)
    prompt = batch_of([ids], len(ids))
    generate = jax.jit(functools.partial(sampling.generate, model=gpt2.GPT2(model), cfg=GREEDY))
    reply = jax.device_get(generate(params, prompt, jax.random.key(0)))
    return reply.tokens[0][reply.mask[0]].tolist()


def test_torch_runs_it_as_we_do(exported, run_folder, recwarn):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.set_num_threads(1)
    model, info = transformers.GPT2LMHeadModel.from_pretrained(exported, output_loading_info=True)
    assert not any(info.values()), info  # missing, unexpected, mismatched keys
    kept = model.generation_config
    assert (kept.do_sample, kept.max_new_tokens) == (False, 12)
    assert kept.eos_token_id == kept.pad_token_id == model.config.eos_token_id

    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    asked = [{"role": "user", "content": "I can't sleep since she left."}]
    inputs = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, return_dict=True, return_tensors="pt", emotion="sadness"
    )
    ids = inputs["input_ids"][0].tolist()
    with torch.no_grad():
        theirs = model.eval()(**inputs).logits.numpy()
        continued = model.generate(**inputs)[0, len(ids) :].tolist()
    ours = gpt2.GPT2(weights.load_pretrained(exported)[0]).apply(
        {"params": run_folder[1]["ppo"]}, jnp.asarray([ids]), jnp.ones((1, len(ids)), bool)
    )
    # float32 against float32 through two layers: rounding is some 1e-6 of the largest logit
    assert np.abs(np.asarray(ours) - theirs).max() < 1e-5 * np.abs(theirs).max()
    assert continued == ours_greedy(exported, ids) and len(set(continued)) > 2
    assert not [w for w in recwarn if "generation" in str(w.message)]
    assert (tokenizer.padding_side, tokenizer.pad_token, tokenizer.model_max_length) == ("left", "<|endoftext|>", 192)


def test_the_cards_snippet_runs(exported, monkeypatch, capsys):
    pytest.importorskip("torch")
    code = re.search(r"```python\n(.*?)```", (exported / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    monkeypatch.chdir(exported)
    exec(code[1], {})  # the text of our own template
    tokenizer = prompts.load_tokenizer(exported)
    client = Turn("client", "I can't sleep since she left.", "sadness")
    ids, _ = prompts.encode_prompt(tokenizer, (), client, PromptConfig())
    assert capsys.readouterr().out == tokenizer.decode(ours_greedy(exported, ids)) + "\n"


@pytest.mark.parametrize("decoding", [SamplingConfig(9, 0.7, 5, 0.9), SamplingConfig(9, 1.3)])
def test_generation_config(decoding, tmp_path):
    transformers = pytest.importorskip("transformers")
    written = export.generation_config(gpt2.GPT2Config(eos_token_id=3), decoding)
    (tmp_path / "generation_config.json").write_text(json.dumps(written))
    read = transformers.GenerationConfig.from_pretrained(tmp_path)
    read.validate(strict=True)
    assert (read.do_sample, read.temperature, read.top_k, read.top_p) == (True, *decoding_of(decoding))
    assert (read.max_new_tokens, read.eos_token_id, read.bos_token_id, read.pad_token_id) == (9, 3, 3, 3)


def decoding_of(decoding: SamplingConfig) -> tuple[float, int, float]:
    return decoding.temperature, decoding.top_k, decoding.top_p


def test_the_critic_is_apart(exported, run_folder):
    assert sorted(load_file(exported / "value_head.safetensors")) == ["value.bias", "value.kernel"]
    assert not any("value" in name for name in load_file(exported / "model.safetensors"))
    same(weights.load_pretrained(exported / "critic")[1], run_folder[1]["base"])
    assert "`critic/` is the model under it." in (exported / "README.md").read_text(encoding="utf-8")


# ---- transformers serve


@pytest.mark.slow
def test_transformers_serve(exported, tmp_path):
    """A real server on the loopback, from the export alone: it gives the reply that we give, and knows the emotion."""
    needed = [name for name in ("torch", "fastapi", "uvicorn", "openai") if importlib.util.find_spec(name) is None]
    if needed:
        pytest.skip(f"transformers serve needs {', '.join(needed)}: pip install 'transformers[serving]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1"}
    url = f"http://127.0.0.1:{port}"

    def post(**more):
        asked = {
            "model": str(exported),
            "messages": [{"role": "user", "content": "She left."}],
            "max_tokens": 12,
            **more,
        }
        body = json.dumps(asked).encode()
        request = urllib.request.Request(f"{url}/v1/chat/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["choices"][0]["message"]["content"]

    with (
        (tmp_path / "log").open("w") as log,
        subprocess.Popen(command, env=environment, stdout=log, stderr=log) as server,
    ):
        try:
            wait_for(f"{url}/health", server, tmp_path / "log")
            tokenizer = prompts.load_tokenizer(exported)
            replies = set()
            for emotion in ("sadness", "joy"):
                ids, _ = prompts.encode_prompt(tokenizer, (), Turn("client", "She left.", emotion), PromptConfig())
                ours = tokenizer.decode(ours_greedy(exported, ids), skip_special_tokens=True)
                assert post(chat_template_kwargs={"emotion": emotion}) == ours
                replies.add(ours)
            assert len(replies) == 2
        finally:
            server.terminate()
            server.wait(timeout=30)


def wait_for(url: str, server: subprocess.Popen, log: Path, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()[-2000:]
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)  # polls a process that ends by itself
    raise AssertionError(f"no answer from {url}: {log.read_text()[-2000:]}")


# ---- the card

HOSTILE = "<script>alert(1)</script> [a](http://b.c) ![x](y) **bold** `code` www.evil.com _i_ | cell\n# head &lt; \u202e~~gone~~"
SHOWN = "<script>alert(1)</script> [a](http://b.c) ![x](y) **bold** `code` www.evil.com _i_ | cell # head &lt; ~~gone~~"


def parsed(text: str):
    """The Markdown's tokens, inline ones too, by a parser that is not ours -> [(type, content)]."""
    markdown_it = pytest.importorskip("markdown_it")
    body = text.split("---\n", 2)[2]
    parser = markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"])
    tokens = parser.parse(body)
    inside = [child for token in tokens for child in token.children or []]
    return [(t.type, t.content, t) for t in tokens + inside]


def texts_of(text: str) -> list[str]:
    """What a reader sees of each paragraph, cell and heading."""
    return ["".join(c.content for c in t.children or []) for kind, _, t in parsed(text) if kind == "inline"]


def a_card(tmp_path: Path, name: str = "mine", stage: str = "ppo", cfg: Config | None = None, **parts) -> str:
    cfg = Config() if cfg is None else cfg
    record = card.Record(cfg, parts.get("results", {}), parts.get("environment", {}), parts.get("metrics", []))
    return card.model_card(name, stage, record, gpt2.GPT2Config(n_positions=256), 1234, GREEDY)


def results_of(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    keys = ("reward", "bleu", "rougeL", "meteor", "emotion_stated_accuracy", "reply_words")
    return {
        "data": {"name": "jsonl", "split": "test", "n": 57, "sha256": "ab" * 32},
        "decoding": {"max_new_tokens": 12, "temperature": 0.7, "top_k": 0, "top_p": 1.0, "candidates": 4, "draws": 2},
        "signature": "tok:x|v1",
        "systems": {
            name: {key: float(rng.random()) for key in keys}
            for name in ("sft", "ppo", "constant", "retrieval", "random")
        },
        "comparisons": {"ppo - random": {"bleu": [0.0101, -0.0202, 0.0303]}, "sft - random": {"bleu": [9.0, 9.0, 9.0]}},
        "emotion_majority_accuracy": 0.4321,
    }


def test_figures_are_the_runs_and_stand_beside_the_trivial_answers(tmp_path):
    results = results_of()
    tokens = parsed(a_card(tmp_path, results=results))
    cells = [c for kind, c, _ in tokens if kind == "inline"]
    head = cells.index("**ppo**")
    assert cells[head : head + 5] == ["**ppo**", "sft", "constant", "retrieval", "random"]  # the model first
    for key, label in (("rougeL", "ROUGE-L"), ("emotion_stated_accuracy", "stated acc\\."), ("reply_words", "words")):
        at = cells.index(label)
        digits = 1 if key == "reply_words" else 4
        order = ("ppo", "sft", "constant", "retrieval", "random")
        assert cells[at + 1 : at + 6] == [f"{results['systems'][name][key]:.{digits}f}" for name in order]
    text = a_card(tmp_path, results=results)
    assert "+0.0101 [-0.0202, +0.0303]" in text and "9.0000" not in text  # of this model alone
    assert "0.4321" in text and "57 exchanges of the test split" in text


def test_what_is_missing_is_said(tmp_path):
    text = a_card(tmp_path)
    assert "**Not evaluated**: the run has no results.json" in text and "| BLEU" not in text
    assert "no environment.json" in text and "no metrics.jsonl" in text
    results = results_of()
    assert "results.json has no row for it" in a_card(tmp_path, stage="base", results=results)
    was = {"seconds": 90.0, "devices": "1 x cpu", "jax": "0.10.2", "commit": "abc"}
    days = {
        "ppo": {**was, "finished": "2026-01-02T00:00:00+00:00"},
        "evaluate": {"finished": "2026-01-01T00:00:00+00:00"},
    }
    stale = a_card(tmp_path, results=results, environment=days)
    assert "older than the weights" in stale and "1.5 min on 1 x cpu, jax 0.10.2, commit abc" in stale
    days["evaluate"]["finished"] = "2026-01-03T00:00:00+00:00"
    assert "older than the weights" not in a_card(tmp_path, results=results, environment=days)


def test_how_training_went(tmp_path):
    lines = [
        {"stage": "sft", "step": 5, "validation_loss": 3.5},
        {"stage": "sft", "step": 9, "validation_loss": 3.75},
        {"stage": "ppo", "step": 0, "validation/reward": 0.125},
        {"stage": "ppo", "step": 4, "validation/reward": 0.5, "alarm": "reward rises while distinct2 falls"},
        {"stage": "ppo", "step": 8, "validation/reward": 0.25},
    ]
    text = a_card(tmp_path, metrics=lines)
    assert "lowest validation loss 3.5000" in text and "validation reward 0.1250 before, 0.5000 at best" in text
    assert "**alarms: 1**, the last one: reward rises while distinct2 falls" in text
    assert "rloo" not in text and "untrained" not in text
    assert "validation reward" not in a_card(tmp_path, stage="sft", metrics=lines)
    assert "the policy is that of iteration 4; " in text and "it ended after 8 of them" in text

    # What is kept by another metric is told by that one, and a run that made nothing better says so.
    for line, meteor in zip(lines[2:], (0.3, 0.2, 0.1), strict=True):
        line["validation/meteor"] = meteor
    kept = a_card(tmp_path, metrics=lines, cfg=Config(ppo=config.PPOConfig(keep_best="meteor", iterations=8)))
    assert "validation meteor 0.3000 before, 0.3000 at best; no iteration was better: the policy is the SFT" in kept
    assert "it ended after" not in kept


def test_settings_are_those_of_the_training(run_folder, tokenizer, tmp_path):
    """config.yaml is that of the last script: an evaluation may have had other weights of the reward."""
    folder = shutil.copytree(run_folder[0], tmp_path / "run")
    trained = dataclasses.replace(CONFIG, ppo=dataclasses.replace(CONFIG.ppo, kl_coef=0.3))
    origin.note(folder / "ppo" / "model", trained, [])
    (folder / "config.yaml").write_text(config.to_yaml(CONFIG), encoding="utf-8")
    assert card.read_record(folder, CONFIG, "ppo").config == trained
    assert card.read_record(folder, CONFIG, "sft").config == CONFIG
    (folder / "ppo" / "model" / origin.SETTINGS).unlink()  # of a model from elsewhere
    assert card.read_record(folder, CONFIG, "ppo").config == CONFIG


def test_markup_in_names_and_data_stays_text(tmp_path):
    results = results_of()
    results["systems"][HOSTILE] = results["systems"]["random"]
    results["data"] |= {"split": HOSTILE, "name": HOSTILE, "sha256": HOSTILE}
    results["signature"] = HOSTILE
    results["comparisons"] = {f"ppo - {HOSTILE}": {HOSTILE: [0.0, 0.0, 0.0]}}
    custom = config.CustomReward(path=f"{HOSTILE}.py:f", weights={HOSTILE: 1.0})
    cfg = Config(
        data=DataConfig(path=f"/home/somebody/secret/{HOSTILE.replace('/', '')}"),
        model=config.ModelConfig(name=f"/home/somebody/{HOSTILE.replace('/', '')}"),
        pretrain=config.PretrainConfig(data=[DataConfig(path=HOSTILE)]),
        rewards=RewardConfig(custom=custom),
    )
    lines = [{"stage": "ppo", "step": 0, "alarm": HOSTILE}]
    was = {"seconds": 1.0, "devices": HOSTILE, "jax": HOSTILE, "commit": HOSTILE}
    text = a_card(tmp_path, HOSTILE, cfg=cfg, results=results, environment={"ppo": was}, metrics=lines)
    kinds = {kind for kind, _, _ in parsed(text)}
    assert not kinds & {"html_block", "html_inline", "link_open", "image", "s_open"}, kinds
    seen = texts_of(text)
    for where in (f"{SHOWN}, ppo", SHOWN):  # the heading; a cell
        assert where in seen
    assert "www.evil" not in text and "http://b" not in text  # which GitHub would make links of by themselves
    assert sum(SHOWN in one for one in seen) >= 6 and "secret" not in text and "/home" not in text
    # as many paragraphs, cells, headings and items as with tame names: nothing broke out of its place
    tame = text_with(HOSTILE, "tame", tmp_path, cfg, results, was, lines)
    marks = ("em_open", "strong_open", "code_inline")
    for shape in (
        lambda t: [k for k, _, x in parsed(t) if x.block],
        lambda t: [k for k, _, _ in parsed(t) if k in marks],
    ):
        assert shape(text) == shape(tame)


def text_with(old: str, new: str, tmp_path, cfg, results, was, lines) -> str:
    """The same card with every hostile string made tame."""
    swap = lambda tree: json.loads(json.dumps(tree).replace(json.dumps(old)[1:-1], new))  # noqa: E731
    custom = config.CustomReward(path=new, weights={new: 1.0})
    cfg = Config(
        data=DataConfig(path=new),
        model=config.ModelConfig(name=new),
        pretrain=config.PretrainConfig(data=[DataConfig(path=new)]),
        rewards=RewardConfig(custom=custom),
    )
    return a_card(tmp_path, new, cfg=cfg, results=swap(results), environment=swap({"ppo": was}), metrics=swap(lines))


@settings(max_examples=200, deadline=None)
@given(
    st.text(st.characters(codec="utf-8"), max_size=20)
    | st.sampled_from([HOSTILE, "1. x", "- x", "> x", "\\|", "a.b 1.5"])
)
def test_escape_shows_any_text_as_it_is(text):
    wanted = "".join(c for c in " ".join(text.split()) if c.isprintable())
    markdown_it = pytest.importorskip("markdown_it")
    (inline,) = [t for t in markdown_it.MarkdownIt("commonmark").parse(f"x{card.escape(text)}x") if t.type == "inline"]
    assert {child.type for child in inline.children} == {"text"} or {c.type for c in inline.children} <= {
        "text",
        "text_special",
    }
    assert "".join(child.content for child in inline.children) == f"x{wanted}x"


# ---- where a model may come from


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_every_place_of_a_run_is_a_model(run_folder, exported, tokenizer):
    folder, made = run_folder
    places = {
        folder: "ppo",
        folder / "ppo": "ppo",
        folder / "ppo" / "model": "ppo",
        exported: "ppo",
        folder / "sft": "sft",
        folder / "base": "base",
        folder / "ppo" / "checkpoints": "ppo/10",
        folder / "ppo" / "checkpoints" / "8": "ppo/8",
        folder / "sft" / "checkpoints": "sft/8",
        folder / "sft" / "checkpoints" / "4": "sft/4",
    }
    for place, name in places.items():
        model, params = weights.load_pretrained(place)
        assert model == gpt2.GPT2Config(
            vocab_size=len(tokenizer), n_positions=192, n_embd=16, n_layer=2, n_head=2, eos_token_id=0
        )
        same(params, made[name])
        assert prompts.load_tokenizer(str(place)).get_vocab() == tokenizer.get_vocab()


def test_a_run_that_goes_on(run_folder, tmp_path, monkeypatch):
    """SFT has a checkpoint and no model yet: the newest whole stage is base, and the checkpoint is a model all the same."""
    folder, made = run_folder
    (tmp_path / "base").symlink_to(folder / "base")
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "checkpoints").symlink_to(folder / "sft" / "checkpoints")
    monkeypatch.chdir(tmp_path)
    same(weights.load_pretrained(".")[1], made["base"])
    same(weights.load_pretrained("./sft/checkpoints")[1], made["sft/8"])
    files = sorted(folder.rglob("*"))
    weights.load_pretrained("./sft/checkpoints/4")
    assert sorted(folder.rglob("*")) == files  # only read


def test_places_that_are_no_model(run_folder, tmp_path):
    folder, _ = run_folder

    def refused(place, *parts):
        for read in (weights.load_pretrained, prompts.load_tokenizer):
            with pytest.raises(weights.WeightsError) as caught:
                read(place)
            message = str(caught.value)
            assert all(part in message for part in (str(place), *parts)) and "\n" not in message, message

    (tmp_path / "notes.txt").touch()
    (tmp_path / "sub").mkdir()
    refused(
        tmp_path, "it holds notes.txt, sub. Accepted is a folder with config.json", "runs/NAME/ppo/checkpoints[/STEP]"
    )
    refused(tmp_path / "sub", "it holds nothing")
    refused(folder / "base" / "checkpoints", "no rows for the prompt's markers yet", str(folder / "base" / "model"))
    moved = tmp_path / "elsewhere" / "ppo" / "checkpoints"
    moved.parent.mkdir(parents=True)
    moved.symlink_to(folder / "ppo" / "checkpoints")
    refused(moved, "a checkpoint outside its run")


def test_checkpoints_that_do_not_fit_or_are_damaged(run_folder, tmp_path):
    folder, _ = run_folder
    run = tmp_path / "run"
    (run / "ppo").mkdir(parents=True)
    (run / "ppo" / "checkpoints").symlink_to(folder / "ppo" / "checkpoints")
    other = gpt2.GPT2Config(vocab_size=406, n_positions=64, n_embd=16, n_layer=2, n_head=2, eos_token_id=0)
    weights.save_pretrained(run / "ppo" / "model", other, random_params(other, 0))
    with pytest.raises(
        weights.WeightsError, match=r"wpe has shape \(192, 16\), its run's config\.json asks for \(64, 16\)"
    ):
        weights.load_pretrained(run / "ppo" / "checkpoints")
    damaged = run / "sft" / "checkpoints" / "3"
    (damaged / "state").mkdir(parents=True)
    weights.save_pretrained(run / "sft" / "model", other, random_params(other, 0))
    with pytest.raises(weights.WeightsError, match=r"checkpoints/3: cannot be read"):
        weights.load_pretrained(damaged)


# ---- the script


@pytest.fixture
def script(monkeypatch):
    """scripts/export_hf.py as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("export_hf")


def test_help_is_quick_and_names_its_flags():
    command = [sys.executable, "-X", "importtime", ROOT / "scripts" / "export_hf.py", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "--stage" in done.stdout and "--out" in done.stdout
    read = set(re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE))
    assert "argparse" in read and not read & {"jax", "torch", "transformers", "flax", "orbax"}


def test_a_run_is_exported(script, run_folder, tmp_path, monkeypatch, capsys):
    folder, made = run_folder
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    monkeypatch.setattr(sys, "argv", ["export_hf.py"])

    def call(*args):
        sys.argv[1:] = ["--config", str(folder / "config.yaml"), "--run_dir", str(folder), *map(str, args)]
        try:
            script.run.main(script.main, "", script.Options)
        except SystemExit as end:
            return end.code, "".join(capsys.readouterr())
        return 0, capsys.readouterr().out

    out = tmp_path / "out"
    assert call("--out", out, "--stage", "sft")[0] == 0
    same(weights.load_pretrained(out)[1], made["sft"])
    assert not (out / "value_head.safetensors").exists()
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before  # the run is only read

    (out / "mine.txt").write_text("kept")
    code, said = call("--out", out)  # over an export of ours; the last stage
    assert code == 0 and "ppo of" in said and "not evaluated yet" in said
    same(weights.load_pretrained(out)[1], made["ppo"])
    assert (out / "mine.txt").read_text() == "kept"

    project = tmp_path / "project"
    project.mkdir()
    (project / "README.md").write_text("# therapy_jax\n")
    for more, sentence in (
        (("--out", project), "is no export of ours"),
        (("--out", folder / "ppo" / "model"), "is no export of ours"),
        (("--out", project / "README.md" / "x"), "cannot be written"),
        (("--prompt.format", "utterance"), "prompt.format was context_emotion, now utterance"),
        (("--run_dir", tmp_path / "none"), "there is no such folder"),
        (("--run_dir", tmp_path), "it holds out, project"),
        (("--stage", "dpo"), "stage"),
        (("--stag", "sft"), "stag"),
    ):
        code, said = call(*more)
        assert code == 2 and sentence in " ".join(said.split()), said
    assert (project / "README.md").read_text() == "# therapy_jax\n"
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


@pytest.mark.slow
def test_training_starts_from_a_checkpoint_of_another_run(run_folder, tmp_path):
    """model.name as a user gives it; with no step to speak of, base is the checkpoint's policy, bit for bit."""
    folder, made = run_folder
    args = [
        "--config",
        "configs/quickstart.yaml",
        "--run_dir",
        tmp_path / "new",
        "--model.name",
        folder / "ppo" / "checkpoints",
    ]
    args += ["--pretrain", "null", "--sft.epochs", "0.05", "--prompt.max_tokens", "60"]
    environment = {**os.environ, "XLA_FLAGS": ""}
    command = [sys.executable, "scripts/train_sft.py", *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    same(weights.load_pretrained(tmp_path / "new" / "base")[1], made["ppo/10"])


def test_read_record(tmp_path, run_folder):
    folder, _ = run_folder
    with pytest.raises(ConfigError, match=r"prompt\.max_tokens was 96, now 128.*--config .*training\.yaml"):
        card.read_record(folder, Config(), "ppo")
    (tmp_path / "metrics.jsonl").write_text('{"stage": "sft", "step": 1}\n{"stage": "sf')  # a line cut by a kill
    assert card.read_record(tmp_path, Config(), "ppo") == card.Record(Config(), {}, {}, [{"stage": "sft", "step": 1}])
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ConfigError, match=r"results\.json: not valid JSON"):
        card.read_record(tmp_path, Config(), "ppo")
    assert tuple(reversed(card.STAGES)) == locate.STAGES
