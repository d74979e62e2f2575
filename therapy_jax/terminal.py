"""A conversation in the terminal: lines in, commands, and the answers as they grow (scripts/chat.py)."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import difflib
import io
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from therapy_jax import conversation, files, gpt2, run, safety
from therapy_jax.config import Config
from therapy_jax.conversation import Answer, Conversation, Message, MessageError, Reader, Speaker
from therapy_jax.dialogue import EMOTIONS

screen = Console(highlight=False)
WIDTH = min(screen.width, 90)  # of what is read as a paragraph

COMMANDS = {
    "/emotion NAME": "what you felt with your last message, which is answered again: " + ", ".join(EMOTIONS),
    "/compare NAME ...": "who answers, side by side: {}. The conversation goes on with the last one's reply",
    "/reset": "forget the conversation",
    "/save [FILE]": "write the conversation as JSON; a file that exists is not overwritten",
    "/help": "this",
    "/quit": "leave, as do Ctrl-D and Ctrl-C",
}
WORDS = [line.split()[0] for line in COMMANDS]


@dataclasses.dataclass
class Chat:
    """What the commands change."""

    config: Config
    folder: Path
    names: list[str]  # of the models that are there
    speakers: list[Speaker]
    reader: Reader | None
    said: Conversation = ()


def chat(config: Config) -> None:
    """Talk until the end of input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (input() can then be edited)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C leaves; there is nothing to finish
    screen.print(Panel(Text(safety.DISCLOSURE), title="Before you start", border_style="yellow", width=WIDTH))
    try:
        state = start(config)
        while (line := ask()) is not None and line != "/quit":
            try:
                command(state, line) if line.startswith("/") else talk(state, line)
            except MessageError as error:
                note(str(error))
    except KeyboardInterrupt:
        screen.print()
    screen.print("Goodbye. What you did not /save is forgotten.")


def start(config: Config) -> Chat:
    """The last model of the run folder, ready to answer."""
    folder, config, names = conversation.open_run(config)
    run.use_cache(config)
    speaker = conversation.load_speaker(folder, names[-1], config)
    reader = None
    if "emotion" in config.prompt.format and config.prompt.emotion == "given" and "sft" in names:
        note("reading the data and the classifier of the client's emotion (trained now where the run has none)")
        trunk = speaker if speaker.name == "sft" else conversation.load_speaker(folder, "sft", config)
        reader = conversation.load_reader(folder, trunk, config, conversation.load_data(config))
    note("compiling the programs: up to a minute, kept on disk afterwards")
    began = time.monotonic()
    conversation.warm_up(speaker, reader, config)
    size, decoding = gpt2.count(speaker.params), run.decoding(config)
    how = "greedy" if decoding.temperature == 0 else f"temperature {decoding.temperature}"
    note(
        f"ready after {time.monotonic() - began:.1f} s: {speaker.name} of {folder}, {size / 1e6:.1f} M parameters, {how}, "
        f"replies of at most {decoding.max_new_tokens} tokens; /help lists the commands"
    )
    return Chat(config, folder, names, [speaker], reader)


def ask() -> str | None:
    """The next line, blank ones left out; None at the end of input. What comes through a pipe is written out, as if typed."""
    while True:
        if sys.stdin.isatty():
            try:
                line = input("\nyou > ")
            except EOFError:
                screen.print()
                return None
        else:
            line = sys.stdin.readline()
            if not line:
                return None
            screen.print(Text(f"\nyou > {line.strip()}"))
        if line.strip():
            return line.strip()


def talk(chat: Chat, text: str) -> None:
    answer(chat, chat.said, text)


def again(chat: Chat, emotion: str | None) -> None:
    """The last message, answered once more."""
    answer(chat, chat.said[:-1], chat.said[-1].client.text, emotion)


def answer(chat: Chat, before: Conversation, text: str, emotion: str | None = None) -> None:
    """Say it, and show the answers as they grow. Until they are complete the conversation stays as it was."""
    said = before
    with Live(Text("..."), console=screen, refresh_per_second=12, vertical_overflow="visible") as live:
        for said in conversation.say(before, text, chat.speakers, chat.reader, chat.config, emotion):
            live.update(show(said[-1], chat))
    chat.said = said
    if not screen.is_terminal:
        screen.print()  # a live display ends its line only where it could be redrawn


def show(message: Message, chat: Chat) -> Group | Panel:
    """A message's answers for the screen; text of people and models is never read as markup."""
    if message.fixed is not None:
        return Panel(Text(message.fixed), title="no model was asked", border_style="yellow", width=WIDTH)
    emotion = Text(f"you: {message.emotion or 'no emotion'}", style="dim")
    if message.emotion:
        sure = "as you say" if message.certainty is None else f"{message.certainty:.0%} sure"
        emotion.append(f", {sure if message.client.emotion else 'as the model writes'} (/emotion corrects it)")
    parts = [emotion] if "emotion" in chat.config.prompt.format else []
    last = [Text(message.reminder, style="yellow")] if message.reminder else []
    if len(chat.speakers) == 1:
        answers = [Text.assemble((f"{a.speaker} > ", "bold"), *said_by(a)) for a in message.answers]
        return Group(*parts, *answers, *last)
    table = Table(box=None, padding=(0, 2, 0, 0), expand=True)
    for speaker in chat.speakers:
        table.add_column(speaker.name, ratio=1)
    answers = [Text.assemble(*said_by(answer)) for answer in message.answers]
    table.add_row(*answers, *[""] * (len(chat.speakers) - len(answers)))
    return Group(*parts, table, *last)


def said_by(answer: Answer) -> list[tuple[str, str]]:
    """An answer in pieces of (text, style)."""
    if answer.withheld:
        return [(answer.text, "yellow"), (f" (withheld: {answer.withheld})", "dim")]
    stated = f"[{answer.emotion}] " if answer.emotion else ""
    growing = "" if answer.ended else " ..." if answer.text else f"... {len(answer.ids)} tokens"  # or cut by the limit
    return [(stated, "dim"), (answer.text, ""), (growing, "dim")]


def command(chat: Chat, line: str) -> None:
    """A line that starts with a slash."""
    try:
        word, *rest = shlex.split(line)
    except ValueError:  # a quote that is not closed
        word, *rest = line.split()
    if rest and safety.crisis(" ".join(rest)):  # whatever it was to do, the gate must see it
        talk(chat, line)
    elif word == "/help":
        table = Table.grid(padding=(0, 2))
        for name, what in COMMANDS.items():
            table.add_row(Text(name), Text(what.format(", ".join(chat.names))))
        screen.print(table)
    elif word == "/reset":
        chat.said = ()
        note("forgotten")
    elif word == "/save":
        save(chat, rest)
    elif word == "/compare":
        compare(chat, rest)
    elif word == "/emotion":
        correct(chat, rest)
    elif safety.crisis(line):  # no command, but something that the gate must see
        talk(chat, line)
    else:
        note(f"there is no {word}; {nearest(word, WORDS)}")


def nearest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"do you mean {close[0]}?" if close else f"there are {', '.join(known)}"


def correct(chat: Chat, rest: list[str]) -> None:
    if "emotion" not in chat.config.prompt.format:
        note(f"this model is told no emotion (prompt.format: {chat.config.prompt.format})")
    elif not chat.said or chat.said[-1].crisis is not None:
        note("say something first: an emotion belongs to a message that a model has answered")
    elif len(rest) != 1 or rest[0] not in EMOTIONS:
        known = nearest(" ".join(rest), EMOTIONS) if rest else f"there are {', '.join(EMOTIONS)}"
        note(f"/emotion takes one of seven; {known}")
    else:
        again(chat, rest[0])


def compare(chat: Chat, rest: list[str]) -> None:
    """Other speakers from now on, and for the last message at once."""
    unknown = [name for name in rest if name not in chat.names]
    if unknown or not rest:
        known = nearest(unknown[0], chat.names) if unknown else f"there are {', '.join(chat.names)}"
        note(f"/compare takes models of {chat.folder}; {known}")
        return
    loaded = {speaker.name: speaker for speaker in chat.speakers}
    chat.speakers = [
        loaded.get(name) or conversation.load_speaker(chat.folder, name, chat.config) for name in dict.fromkeys(rest)
    ]
    if chat.said and chat.said[-1].crisis is None:
        last = chat.said[-1]
        again(chat, None if last.certainty else last.client.emotion)  # read again, or as it was set
    else:
        note(f"{', '.join(rest)} answer from now on")


def save(chat: Chat, rest: list[str]) -> None:
    now = datetime.datetime.now()
    path = Path(rest[0]) if rest else chat.folder / "chats" / f"{now:%Y-%m-%d_%H%M%S}.json"
    try:
        path = path.expanduser() if rest else path
        if path.exists():
            note(f"{path} exists and is left as it is; give another name")
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(path, as_json(chat, now))
    except (OSError, RuntimeError, ValueError) as error:  # the conversation must not be lost with the name
        note(f"{path} cannot be written ({getattr(error, 'strerror', None) or error}); give another name")
        return
    note(f"saved: {path}")


def as_json(chat: Chat, now: datetime.datetime) -> dict:
    return {
        "disclosure": safety.DISCLOSURE,
        "saved": now.isoformat(timespec="seconds"),
        "models": {s.name: str(chat.folder / s.name / "model") for s in chat.speakers},
        "seed": chat.config.seed,
        "prompt": dataclasses.asdict(chat.config.prompt),
        "decoding": dataclasses.asdict(run.decoding(chat.config)),
        "conversation": [
            {
                "client": message.client.text,
                "emotion": message.emotion,
                "crisis": message.crisis,
                "fixed_answer": message.fixed,
                "answers": [
                    {"model": a.speaker, "text": a.text, "emotion": a.emotion, "withheld": a.withheld, "ended": a.ended}
                    for a in message.answers
                ],
            }
            for message in chat.said
        ],
    }


def note(text: str) -> None:
    screen.print(Text(text, style="dim"), soft_wrap=True)  # a path is not broken
