"""A conversation in the browser: every model of a run answers side by side (scripts/play.py).

The page is ours, as HTML made here from escaped text; gradio (extra `ui`) carries it, on 127.0.0.1 alone. Nothing is asked
of any other machine: no fonts, no analytics, no share link; and pages of other sites are not answered.
"""

from __future__ import annotations

import html
import importlib
import os
import signal
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from therapy_jax import conversation, gpt2, readout, run, safety, stages
from therapy_jax.config import Config, ConfigError
from therapy_jax.conversation import Answer, Conversation, Message, MessageError, Reader, Speaker
from therapy_jax.dialogue import EMOTIONS
from therapy_jax.evaluate import Scorer
from therapy_jax.run import console

CSS = """
.tj { font-size: 1rem; line-height: 1.5; color: var(--body-text-color); }
.tj-care { border: 1px solid #b45309; border-left-width: 6px; border-radius: 8px; padding: .6rem 1rem;
  background: color-mix(in srgb, #f59e0b 12%, transparent); white-space: pre-wrap; }
.tj-you { margin: 1.4rem 0 .5rem; padding: .5rem .9rem; border-radius: 12px; width: fit-content; max-width: 100%;
  margin-left: auto; background: color-mix(in srgb, #3b82f6 16%, transparent); white-space: pre-wrap; overflow-wrap: anywhere; }
.tj-quiet { color: color-mix(in srgb, var(--body-text-color) 68%, transparent); font-size: .85rem; }
.tj-cards { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); }
.tj-card { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: .6rem .9rem; min-width: 0;
  background: var(--block-background-fill); }
.tj-card h3 { margin: 0; font-size: .85rem; letter-spacing: .04em; color: inherit; }
.tj-card h3 span { font-weight: normal; }
.tj-card p { margin: .3rem 0 .6rem; min-height: 1.5rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.tj-bar { display: grid; grid-template-columns: 6.2rem 1fr 5.6rem; gap: .5rem; align-items: center; font-size: .8rem; }
.tj-bar > :last-child { text-align: right; font-variant-numeric: tabular-nums; }
.tj-track { position: relative; height: .6rem; border-radius: 3px; background: color-mix(in srgb, currentColor 10%, transparent); }
.tj-track i { position: absolute; top: 0; bottom: 0; border-radius: 3px; }
.tj-track b { position: absolute; left: 50%; top: -2px; bottom: -2px; width: 1px; background: currentColor; opacity: .5; }
.tj details { margin-top: .6rem; font-size: .8rem; }
.tj summary { cursor: pointer; color: var(--link-text-color, #2563eb); }
.tj-strip { display: flex; flex-wrap: wrap; gap: 2px; margin-top: .4rem; }
.tj-strip span { display: flex; flex-direction: column; align-items: center; padding: 1px 4px; border-radius: 4px;
  font-family: ui-monospace, monospace; white-space: pre; }
.tj-strip small { font-size: .68rem; opacity: .75; font-variant-numeric: tabular-nums; }
footer { display: none !important; }
.tj-block, .tj-block > div, .tj-block .html-container { padding: 0 !important; }
"""


class Details(NamedTuple):
    """What is known of an answer that is complete."""

    measures: readout.Measures
    loupe: list[tuple[str, float, float]]


Shown = tuple[tuple[Details | None, ...], ...]  # of each message, of each answer


# ------------------------------------------------------------------------------------------------ a conversation as HTML


def as_html(said: Conversation, known: Shown, weights: dict[str, float], problem: str = "") -> str:
    """The whole conversation. Nothing that a person or a model wrote reaches the page unescaped."""
    parts = [message_html(m, known[i] if i < len(known) else (), weights) for i, m in enumerate(said)]
    if problem:
        parts.append(f'<p class="tj-care" role="alert">{html.escape(problem)}</p>')
    return f'<div class="tj" aria-live="polite">{"".join(parts)}</div>'


def message_html(message: Message, known: Sequence[Details | None], weights: dict[str, float]) -> str:
    you = f'<div class="tj-you">{html.escape(message.client.text)}</div>'
    if message.fixed is not None:
        return f'{you}<div class="tj-care" data-crisis><b>No model was asked.</b>\n{html.escape(message.fixed)}</div>'
    cards = [
        card_html(answer, known[i] if i < len(known) else None, weights) for i, answer in enumerate(message.answers)
    ]
    reminder = f'<p class="tj-care">{html.escape(message.reminder)}</p>' if message.reminder else ""
    return f'{you}<div class="tj-cards">{"".join(cards)}</div>{reminder}'


def card_html(answer: Answer, known: Details | None, weights: dict[str, float]) -> str:
    stated = f" states {html.escape(answer.emotion)}" if answer.emotion else ""
    text = html.escape(answer.text) + ("" if answer.ended else " …") or '<span class="tj-quiet">(nothing)</span>'
    why = f'<div class="tj-quiet">withheld: {html.escape(answer.withheld)}</div>' if answer.withheld else ""
    more = details_html(known, weights) if known else ""
    return (
        f'<section class="tj-card" data-model="{html.escape(answer.speaker)}"{" data-done" if known or why else ""}>'
        f'<h3><b>{html.escape(answer.speaker)}</b><span class="tj-quiet">{stated}</span></h3><p>{text}</p>{why}{more}</section>'
    )


def details_html(known: Details, weights: dict[str, float]) -> str:
    terms, expressed, words = known.measures
    rows = [signed_bar(name, value, weights.get(name, 0.0)) for name, value in terms.items()]
    read = [share_bar(name, share) for name, share in expressed.items() if share >= 0.05][:3]
    return (
        f'{"".join(rows)}<div class="tj-quiet">{words} words, which read as</div>{"".join(read)}'
        f"<details><summary>Loupe</summary>{loupe_html(known.loupe)}</details>"
    )


def signed_bar(name: str, value: float, weight: float) -> str:
    """A reward term in [-1, 1], and its weight in the run's reward."""
    width, left = abs(value) * 50, 50 - max(-value, 0) * 50
    colour = "#15803d" if value >= 0 else "#b91c1c"
    return (
        f'<div class="tj-bar"><span>{name}</span><span class="tj-track"><b></b>'
        f'<i style="left:{left:.1f}%;width:{width:.1f}%;background:{colour}"></i></span><span>{value:+.2f} × {weight:g}</span></div>'
    )


def share_bar(name: str, share: float) -> str:
    return (
        f'<div class="tj-bar"><span>{name}</span><span class="tj-track">'
        f'<i style="left:0;width:{share * 100:.1f}%;background:#6366f1"></i></span><span>{share:.0%}</span></div>'
    )


def loupe_html(tokens: Sequence[tuple[str, float, float]]) -> str:
    """Each token over its log-prob under this model and under the SFT model; green where this one finds it likelier."""
    spans = []
    for text, ours, theirs in tokens:
        gap = ours - theirs
        strength = min(abs(gap) / 3, 1) * 45  # three nats: twenty times as likely
        colour = f"color-mix(in srgb, {'#16a34a' if gap > 0 else '#dc2626'} {strength:.0f}%, transparent)"
        visible = html.escape(text.replace(" ", "·").replace("\n", "⏎") or "∅")
        spans.append(
            f'<span style="background:{colour}">{visible}<small>{ours:.2f}</small><small>{theirs:.2f}</small></span>'
        )
    legend = "each token, its log-prob (nats) under this model, and under SFT; green: likelier here, red: less likely"
    return f'<div class="tj-quiet">{legend}</div><div class="tj-strip">{"".join(spans)}</div>'


# ---------------------------------------------------------------------------------------------------------------- the app


class Play(NamedTuple):
    """What stays the same while people talk."""

    config: Config
    speakers: list[Speaker]
    reader: Reader | None
    scorer: Scorer | None  # None where there is no SFT model
    weights: dict[str, float]


def prepare(config: Config) -> Play:
    """Every model of the run folder, ready to answer."""
    folder, config, names = conversation.open_run(config)
    run.use_cache(config)
    speakers = [conversation.load_speaker(folder, name, config) for name in names]
    reader = scorer = None
    if "sft" in names:
        console.print("reading the data and the classifiers of the run (trained now where there are none)")
        data, sft = conversation.load_data(config), speakers[names.index("sft")]
        if "emotion" in config.prompt.format and config.prompt.emotion == "given":
            reader = conversation.load_reader(folder, sft, config, data)
        scorer = stages.make_scorer(folder, config, data, sft.model.config, sft.params, sft.tokenizer)
    console.print("compiling the programs: up to a minute, kept on disk afterwards")
    play = Play(config, speakers, reader, scorer, scorer.weights if scorer else {})
    for speaker in speakers:
        conversation.warm_up(speaker, reader, config)
    *_, said = conversation.say((), "Hello.", speakers, reader, config)
    details(play, said)
    return play


def details(play: Play, said: Conversation) -> tuple[Details | None, ...]:
    """Of the answers to the last message. A withheld one has none: its tokens are not shown, nor those of an answer that was shown
    in part and holds elsewhere what may not be shown."""
    message, scorer = said[-1], play.scorer
    if scorer is None or not message.answers:
        return ()
    sft = next(speaker for speaker in play.speakers if speaker.name == "sft")
    measured = readout.measure(scorer, conversation.context(said[:-1]), message.client, message.answers)
    return tuple(
        None
        if answer.withheld or safety.check_reply(speaker.tokenizer.decode(answer.ids, skip_special_tokens=True))
        else Details(measures, readout.loupe(speaker, sft, answer))
        for answer, measures, speaker in zip(message.answers, measured, play.speakers, strict=True)
    )


State = tuple[Conversation, Shown]


Step = tuple[State, str, str | None]  # the state, the page, the client's emotion


def talk(play: Play, state: State, text: str, emotion: str | None = None, again: bool = False) -> Iterator[Step]:
    """One message, or the last one `again`, each time that an answer has grown. Where it cannot be answered all stays."""
    said, known = state
    before = (said[:-1], known[:-1]) if again else state
    now = said
    try:
        for now in conversation.say(before[0], text, play.speakers, play.reader, play.config, emotion):
            yield step(play, (now, before[1]))
    except MessageError as error:
        yield step(play, state, str(error))
        return
    yield step(play, (now, (*before[1], details(play, now))))


def step(play: Play, state: State, problem: str = "") -> Step:
    said, known = state
    return state, as_html(said, known, play.weights, problem), said[-1].emotion if said else None


def send(play: Play, state: State, text: str) -> Iterator[Step]:
    """What a person typed."""
    yield from talk(play, state, text) if text.strip() else [step(play, state)]


def correct(play: Play, state: State, emotion: str) -> Iterator[Step]:
    """The last message again, with the emotion that the person says it had; not where the gate has answered it, nor where it
    has been answered with that emotion (gradio tells of one choice twice)."""
    said, _ = state
    if said and said[-1].crisis is None and said[-1].emotion != emotion:
        yield from talk(play, state, said[-1].client.text, emotion, again=True)
    else:
        yield step(play, state)


def only_own_page(app: Any) -> Any:
    """ASGI: 403 for the page of another site, which a browser names as Origin, and for files, of which this page takes none."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        headers = dict(scope.get("headers", ()))
        own = b"http://" + headers.get(b"host", b"")
        foreign = headers.get(b"origin", own) != own
        if scope["type"] == "http" and (foreign or "/gradio_api/upload" in scope["path"]):
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body"})
        else:
            await app(scope, receive, send)

    return answer


def serve(config: Config) -> None:
    """Until Ctrl-C, on 127.0.0.1: the first free port from 7860, or $GRADIO_SERVER_PORT."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import, which may ask for a newer version
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    # gradio asks its own page whether it is there: no proxy can tell.
    direct = [os.environ.get("NO_PROXY"), os.environ.get("no_proxy"), "127.0.0.1,localhost"]
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = ",".join(filter(None, direct))
    try:
        gradio: Any = importlib.import_module("gradio")
        middleware: Any = importlib.import_module("starlette.middleware")
        hosts: Any = importlib.import_module("starlette.middleware.trustedhost")
    except ImportError as error:
        raise ConfigError(f"the page needs gradio ({error}); install the extra: pip install -e '.[ui]'") from error
    play = prepare(config)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C leaves; there is nothing to finish
    app = build(gradio, play)
    readable: dict[str, Any] = {"block_info_text_color": "#52525b", "block_info_text_color_dark": "#d4d4d8"}
    readable |= {"input_placeholder_color": "#71717a", "input_placeholder_color_dark": "#a1a1aa"}
    theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    guards = [  # another site's name can come to lead here after its page is loaded: hence the look at Host
        middleware.Middleware(hosts.TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"]),
        middleware.Middleware(only_own_page),
    ]
    app.queue()
    try:
        _, url, _ = app.launch(
            server_name="127.0.0.1", share=False, ssr_mode=False, pwa=False, mcp_server=False, enable_monitoring=False,
            run_history=False, footer_links=[], css=CSS, quiet=True, prevent_thread_lock=True,
            theme=theme.set(**readable), app_kwargs={"middleware": guards},
        )  # fmt: skip
    except Exception as error:  # no free port, or no port at all; where a proxy is in the way, gradio raises a bare one
        raise ConfigError(
            f"the page cannot be served ({error}); choose another port with GRADIO_SERVER_PORT"
        ) from error
    console.print(f"open {url} in a browser on this machine; Ctrl-C ends it")
    app.block_thread()


def build(gradio: Any, play: Play) -> Any:
    """The page: disclosure, conversation, message, emotion."""
    told = "emotion" in play.config.prompt.format
    how = "written by the model" if play.config.prompt.emotion == "inferred" else "read by the run's classifier"
    lead, names = play.speakers[-1].name, ", ".join(s.name for s in play.speakers)
    about = (
        f"<div class='tj tj-quiet'>{names} of {html.escape(play.config.run_dir)} "
        f"({gpt2.count(play.speakers[-1].params) / 1e6:.1f} M parameters) read the same turns; the conversation goes on with "
        f"{lead}'s reply. Bars: value × its weight in the run's reward, only of the terms that need no therapist's reply to "
        f"compare with (ROUGE, BLEU, meaning, length, strategy and the emotion terms do, and here there is none).</div>"
    )
    with gradio.Blocks(title="therapy_jax: a research demo, not care", analytics_enabled=False) as app:
        state = gradio.State(((), ()))
        gradio.HTML(
            f"<div class='tj'><div class='tj-care' role='note' id='disclosure'>{html.escape(safety.DISCLOSURE)}</div></div>",
            elem_classes="tj-block",
        )
        page = gradio.HTML(as_html((), (), {}), elem_id="conversation", elem_classes="tj-block")
        with gradio.Row(equal_height=True):
            box = gradio.Textbox(
                label="What you say", placeholder="Enter sends", lines=1, max_lines=6, scale=6, autofocus=True,
                elem_id="message",
            )  # fmt: skip
            emotion = gradio.Dropdown(
                list(EMOTIONS), value=None, label="Your emotion", info=f"{how}; change it, and you are answered again",
                visible=told, scale=2, min_width=220, elem_id="emotion",
            )  # fmt: skip
        with gradio.Row():
            go = gradio.Button("Send", variant="primary", scale=0, min_width=140, elem_id="send")
            anew = gradio.Button("Start anew", scale=0, min_width=140, elem_id="anew")
        gradio.HTML(about, elem_classes="tj-block")

        def on_send(state, text):
            for new in send(play, state, text):
                refused = new[0] is state and text.strip()  # it can be shortened and sent again
                yield *new, text if refused else gradio.skip()

        def on_emotion(state, felt):
            yield from correct(play, state, felt)

        outputs = [state, page, emotion]
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        # One queue for all that changes the conversation. With one each, a message sent while the last one is still being answered
        # would be overwritten by what that answer ends with, and with it the gate's words.
        private |= {"concurrency_id": "conversation", "concurrency_limit": 1}
        down = "() => window.scrollTo({top: document.body.scrollHeight, behavior: 'smooth'})"
        # What is sent while an answer grows waits in that queue, and meets the state that the answer leaves. The browser takes it
        # out of the box as it is sent: the server would be later, and wipe what has been typed since.
        take = """(state, text) => {
            const box = document.querySelector('#message textarea');
            box.value = box.value.replace(text, '');
            box.dispatchEvent(new Event('input', {bubbles: true}));
            return [state, text];
        }"""
        for event in (go.click, box.submit):
            sent = event(on_send, [state, box], [*outputs, box], js=take, trigger_mode="multiple", **private)
            sent.then(None, js=down)
        emotion.input(on_emotion, [state, emotion], outputs, **private).then(None, js=down)
        anew.click(lambda: (((), ()), as_html((), (), {}), None), None, outputs, **private)
    return app
