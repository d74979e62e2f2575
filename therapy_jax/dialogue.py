"""Dialogue files in, leak-free exchanges out: the first room of the house.

A *turn* is what one speaker says until the other answers; an *exchange* is a client turn, the therapist turn that
directly follows it, and everything said before. Three formats are read:

`mesc`        MESC.csv: Utterance, Speaker, Emotion, Strategy, Dialogue_ID, Utterance_ID; one row an utterance.
`empathetic`  EmpatheticDialogues as a folder of EMOTION.csv: Dialog_ID, Type, Actor, Text.
`jsonl`       our own: JSON Lines, one conversation a line (keys with ? may be left out, other keys are an error):

    {"id": str, "problem"?: str, "split"?: "train" | "validation" | "test" (on every line or on none), "turns":
     [{"speaker": "client" | "therapist", "text": str, "emotion"?: of EMOTIONS, "strategy"?: of STRATEGIES}, ...]}

Splits are by conversation, never by utterance. Cleaning changes text, never labels, and never costs validation or test
an exchange, so scores with and without it are over the same examples. Errors quote labels and ids, never what was said.
"""

import csv
import hashlib
import io
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from therapy_jax.cleaning import clean_line
from therapy_jax.files import local_path

EMOTIONS = ("neutral", "depression", "anger", "disgust", "joy", "sadness", "fear")  # the position is the label id
STRATEGIES = (
    *("Open question", "Approval", "Self-disclosure", "Restatement", "Interpretation", "Advisement"),
    *("Communication Skills", "Structuring the therapy", "Guiding the Pace and Depth of the Conversation", "Others"),
)
EMPATHETIC_EMOTIONS = tuple(
    "afraid angry annoyed anticipating anxious apprehensive ashamed caring confident content devastated disappointed "
    "disgusted embarrassed excited faithful furious grateful guilty hopeful impressed jealous joyful lonely nostalgic "
    "prepared proud sad sentimental surprised terrified trusting".split()
)
SPLITS = ("train", "validation", "test")
FRACTIONS = {"mesc": (0.8, 0.1), "empathetic": (0.9, 0.05), "jsonl": (0.8, 0.1)}  # of train and validation
SAMPLE = Path(__file__).parent / "sample" / "dialogues.jsonl"
OFFICIAL = Path(__file__).parent / "official_splits" / "mesc.json"  # MESC's ids of validation and test


@dataclass(frozen=True)
class Turn:
    """What one speaker ("client" or "therapist") says until the other answers; the labels are its last utterance's."""

    speaker: str
    text: str
    emotion: str | None = None
    strategy: str | None = None


@dataclass(frozen=True)
class Dialogue:
    """A whole conversation; `problem` is what the client came with, `split` the part of the data it belongs to."""

    conversation_id: str
    turns: tuple[Turn, ...]
    problem: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class Exchange:
    """A client turn, the therapist turn that answers it, and all turns before the two, oldest first."""

    conversation_id: str
    context: tuple[Turn, ...]
    client: Turn
    therapist: Turn


@dataclass
class Report:
    """What reading changed (`counts`: kind -> how often) and which rows it left out (`skipped`: a message each)."""

    counts: Counter[str] = field(default_factory=Counter)
    skipped: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report for printing: changes, commonest first, then the skipped rows in file order."""
        changes = [f"{n:7,d}  {kind}" for kind, n in self.counts.most_common()]
        return changes + [f"skipped: {message}" for message in self.skipped]


class DataError(ValueError):
    """Data that cannot be used; one sentence: file, line, field, what is wrong and what to do."""


def read(
    path: str | Path | None, format: str = "mesc", splits: str | Path | None = None, clean: bool = True,
    on_bad_row: str = "error", seed: int = 0, report: Report | None = None,
) -> dict[str, list[Exchange]]:  # fmt: skip
    """The exchanges of a data set by split. Arguments, keys and what it raises are those of `read_dialogues`."""
    dialogues = read_dialogues(path, format, splits, clean, on_bad_row, seed, report)
    return {split: [exchange for dialogue in dialogues[split] for exchange in exchanges(dialogue)] for split in SPLITS}


def exchanges(dialogue: Dialogue) -> list[Exchange]:
    """Every client turn directly followed by a therapist turn; the context is all turns before it."""
    turns, speakers = dialogue.turns, [turn.speaker for turn in dialogue.turns]
    places = [i for i in range(len(turns) - 1) if speakers[i : i + 2] == ["client", "therapist"]]
    return [Exchange(dialogue.conversation_id, turns[:i], turns[i], turns[i + 1]) for i in places]


def read_dialogues(
    path: str | Path | None, format: str = "mesc", splits: str | Path | None = None, clean: bool = True,
    on_bad_row: str = "error", seed: int = 0, report: Report | None = None,
) -> dict[str, list[Dialogue]]:  # fmt: skip
    """Whole conversations under "train", "validation" and "test": always all three keys, in this order.

    path        MESC.csv, the EmpatheticDialogues folder, or a JSON Lines file (None: the built-in sample).
    format      "mesc", "empathetic" or "jsonl".
    splits      "official" (MESC only); or a JSON file {"train"?: ids, "validation": ids, "test": ids}, the rest being
                train if that key is missing; or None: the file's own `split` keys, else `split_of` id and `seed`.
    clean       tidy every text by `clean_line`, and drop from train what is said word for word in another conversation.
    on_bad_row  "error" raises at the first bad row; "skip" leaves out that row alone and notes it in the report.
    report      a `Report` to fill in.

    Raises DataError for data that cannot be used (a whole file or folder also under "skip"), and ValueError for a
    `format` or `on_bad_row` that does not exist.
    """
    if format not in FRACTIONS:
        raise ValueError(f"format is {format!r}; choose one of {', '.join(FRACTIONS)}.")
    if on_bad_row not in ("error", "skip"):
        raise ValueError(f"on_bad_row is {on_bad_row!r}; choose error or skip.")
    if path is None and format != "jsonl":
        raise DataError(f"path is missing: give that of the {format} data, or format='jsonl' for the built-in sample.")
    path, report = SAMPLE if path is None else local_path(path), Report() if report is None else report

    hint = ", or leave out such rows with on_bad_row='skip'"

    @contextmanager
    def tolerant() -> Iterator[None]:
        try:
            yield
        except DataError as error:
            if on_bad_row == "error":
                raise DataError(str(error).removesuffix(".").removesuffix(hint) + hint + ".") from None
            report.counts["bad row skipped"] += 1
            report.skipped.append(str(error))

    # Labels are always folded, since another case is no other label; it is reported only as part of cleaning.
    reader = {"mesc": _read_mesc, "empathetic": _read_empathetic, "jsonl": _read_jsonl}[format]
    raw = reader(path, tolerant, report.counts if clean else Counter())
    if not any(dialogue.turns for dialogue in raw):
        raise DataError(f"{path} holds no usable row: check that it is the right file and that its format is {format}.")
    split_by_id = _assign_splits(raw, path, format, splits, seed)
    result: dict[str, list[Dialogue]] = {split: [] for split in SPLITS}
    seen: set[tuple[tuple[str, str], ...]] = set()
    # Train comes last: where one conversation stands in two splits, it is train that gives it up.
    for dialogue in sorted(raw, key=lambda d: split_by_id[d.conversation_id] == "train"):
        split = split_by_id[dialogue.conversation_id]
        turns = _clean_turns(dialogue.turns, split, report.counts) if clean and split else _join(dialogue.turns)
        # As train would have it: elsewhere a turn that is emptied stays as it was, which is no other conversation.
        as_it_is = split == "train" or not clean
        words = turns if as_it_is else _clean_turns(dialogue.turns, "train", Counter())
        said = tuple((turn.speaker, turn.text) for turn in words)
        if not split:
            report.counts["conversation in no split left out"] += 1
        elif not turns:
            report.counts["empty conversation dropped"] += 1
        elif clean and split == "train" and said in seen:
            report.counts["duplicate conversation dropped"] += 1
        else:
            seen.add(said)
            result[split].append(replace(dialogue, turns=turns, split=split))
    return result


# Readers: conversations whose turns are still single utterances; labels checked, text untouched.

Tolerant = Callable[[], AbstractContextManager[None]]  # guards a row: what a DataError does to the rest of the file
_LABELS = {"speaker": ("client", "therapist"), "emotion": EMOTIONS, "strategy": STRATEGIES}


def _read_mesc(path: Path, tolerant: Tolerant, counts: Counter[str]) -> list[Dialogue]:
    rows: defaultdict[int, dict[int, Turn]] = defaultdict(dict)
    columns = ("Utterance", "Speaker", "Emotion", "Strategy", "Dialogue_ID", "Utterance_ID")
    for where, row in _csv_rows(path, columns, tolerant):
        with tolerant():
            for name in columns[-2:]:
                if not re.fullmatch(r"\s*[0-9]{1,18}\s*", row[name]):
                    raise _error(where, name, f"{row[name][:40]!r} is not a whole number", "number from 0")
            utterances, place = rows[int(row["Dialogue_ID"])], int(row["Utterance_ID"])
            if place in utterances:
                raise _error(where, "Utterance_ID", f"{place} stands twice in its dialogue", "number each row once")
            speaker = _label(where, "Speaker", row["Speaker"], ("Client", "Therapist"), counts).lower()
            emotion = _label(where, "Emotion", row["Emotion"], EMOTIONS, counts)
            # MESC writes "undefined" for every client, who has no strategy; for a therapist it would be a gap.
            allowed = STRATEGIES if speaker == "therapist" else ("undefined", *STRATEGIES)
            strategy = _label(where, "Strategy", row["Strategy"], allowed, counts)
            text = _string(where, "Utterance", row["Utterance"])
            utterances[place] = Turn(speaker, text, emotion, None if strategy == "undefined" else strategy)
    # The ids give the order, not the clock: some rows of MESC start before the row that precedes them.
    return [Dialogue(str(i), tuple(rows[i][place] for place in sorted(rows[i]))) for i in sorted(rows)]


def _read_empathetic(path: Path, tolerant: Tolerant, counts: Counter[str]) -> list[Dialogue]:
    files = sorted(path.glob("*.csv")) if path.is_dir() else []
    if not files:
        what = "holds no CSV file" if path.is_dir() else "is a file" if path.exists() else "does not exist"
        raise DataError(f"{path} {what}: give the folder that holds one CSV file per emotion.")
    rows: defaultdict[str, list[Turn]] = defaultdict(list)
    home: dict[str, Path] = {}
    for file in files:
        if file.stem not in EMPATHETIC_EMOTIONS:
            raise DataError(f"{file}: the file name is none of the 32 emotions; rename the file or take it out.")
        for where, row in _csv_rows(file, ("Dialog_ID", "Type", "Actor", "Text"), tolerant):
            with tolerant():
                if _label(where, "Type", row["Type"], ("situation", "utterance"), counts) == "situation":
                    continue
                actor = _label(where, "Actor", row["Actor"], ("speaker", "listener"), counts)
                text, dialog = (_string(where, name, row[name]) for name in ("Text", "Dialog_ID"))
                if home.setdefault(dialog, file) != file:
                    raise _error(
                        where, "Dialog_ID", f"{dialog[:40]!r} stands in {home[dialog].name} too", "make ids unique"
                    )
                # The emotion is that of the speaker, whose story it is; the listener's was never asked for.
                rows[dialog].append(Turn("client", text, file.stem) if actor == "speaker" else Turn("therapist", text))
    return [Dialogue(dialog, tuple(turns)) for dialog, turns in rows.items()]


def _read_jsonl(path: Path, tolerant: Tolerant, counts: Counter[str]) -> list[Dialogue]:
    dialogues: dict[str, Dialogue] = {}
    first_has_split: bool | None = None
    # Not str.splitlines: it also breaks at characters such as U+2028, which may stand unescaped in a JSON string.
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        where = f"{path}, line {number}"
        with tolerant():
            if not line.strip():
                continue
            record = _check_keys(where, "", _json(where, line), ("id", "turns"), ("problem", "split"))
            conversation_id = _string(where, "id", record["id"])
            if conversation_id in dialogues:
                raise _error(where, "id", f"{conversation_id[:40]!r} stands on an earlier line too", "make ids unique")
            if first_has_split not in (None, "split" in record):
                raise _error(where, "split", "on some lines only", "give it on every line or on none")
            split = _label(where, "split", record["split"], SPLITS, counts) if "split" in record else None
            problem = _string(where, "problem", record["problem"]) if record.get("problem") is not None else None
            if not isinstance(record["turns"], list) or not record["turns"]:
                raise _error(where, "turns", "not a list of turns", "give at least one turn")
            turns: list[Turn] = []
            for i, entry in enumerate(record["turns"]):
                with tolerant():
                    name = f"turns[{i}]."
                    _check_keys(where, name, entry, ("speaker", "text"), ("emotion", "strategy"))
                    labels = {
                        key: _label(where, name + key, entry[key], allowed, counts)
                        for key, allowed in _LABELS.items()
                        if key == "speaker" or entry.get(key) is not None
                    }
                    turns.append(Turn(text=_string(where, name + "text", entry["text"]), **labels))
            first_has_split = "split" in record if first_has_split is None else first_has_split
            dialogues[conversation_id] = Dialogue(conversation_id, tuple(turns), problem, split)
    return list(dialogues.values())


def _read_text(path: Path) -> str:
    if not path.is_file():
        what = "is a folder: give the file in it" if path.is_dir() else "does not exist: check the path"
        raise DataError(f"{path} {what}.")
    data = path.read_bytes()
    try:
        text = data.decode().removeprefix("\ufeff")  # the byte order mark that some spreadsheets write
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: byte {error.start} is not UTF-8; save the file as UTF-8.") from error
    if not text.strip():
        raise DataError(f"{path} is empty: give a file that holds conversations.")
    return text


def _csv_rows(path: Path, columns: tuple[str, ...], tolerant: Tolerant) -> list[tuple[str, dict[str, str]]]:
    """Each row as its place (file, line) and a dict of column -> cell."""
    rows: list[tuple[str, dict[str, str]]] = []
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    limit = csv.field_size_limit(2**31 - 1)  # put back below: it is the process's. sys.maxsize overflows a 32-bit long
    try:
        header = [cell.strip() for cell in next(reader)]
        for name in columns:
            if header.count(name) != 1:
                what = f"{header.count(name)} columns of this name in the header"
                raise _error(f"{path}, line 1", name, what, f"give one column each of {', '.join(columns)}")
        for cells in reader:
            where = f"{path}, line {reader.line_num}"
            with tolerant():
                if len(cells) not in (0, len(header)):  # 0 is a blank line
                    name = header[min(len(cells), len(header) - 1)]
                    what = f"the row has {len(cells)} fields, the header {len(header)}"
                    raise _error(where, name, what, "quote fields that hold commas")
                if cells:
                    rows.append((where, dict(zip(header, cells, strict=True))))
        return rows
    except csv.Error as error:  # past a broken quote nobody can tell where rows begin, so nothing is skipped here
        what = f"broken quoting ({error}); close every quote and double those inside a field"
        raise DataError(f"{path}, line {reader.line_num}: {what}.") from error
    finally:
        csv.field_size_limit(limit)


def _json(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        what = getattr(error, "msg", "a number too long or nesting too deep")
        raise DataError(f"{where}: broken JSON ({what}); give one whole JSON object.") from error


def _check_keys(where: str, prefix: str, record: Any, needed: tuple[str, ...], optional: tuple[str, ...]) -> Any:
    if not isinstance(record, dict):
        raise _error(where, prefix.rstrip(".") or "(all)", "not a JSON object", f"give one of {', '.join(needed)}")
    for key in (*needed, *record):
        if key not in record or key not in needed + optional:
            what = "unknown key" if key in record else "the key is missing"
            todo = f"give {', '.join(needed)} and, if wanted, {', '.join(optional)}"
            raise _error(where, prefix + key[:40], what, todo)
    return record


def _string(where: str, name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _error(where, name, "text is missing" if value in (None, "") else "not a text, or blank", "fill it in")
    if re.search("[\ud800-\udfff]", value):  # JSON lets it through, and no tokenizer can take it
        raise _error(where, name, "half a surrogate pair, which is no character", "repair the escape")
    return value


def _label(where: str, name: str, value: Any, allowed: tuple[str, ...], counts: Counter[str]) -> str:
    if value in allowed:
        return value
    folded = " ".join(value.split()).casefold() if isinstance(value, str) else None
    label = next((label for label in allowed if label.casefold() == folded), None)
    if label is None:
        what = "the label is missing" if value in (None, "") else f"{str(value)[:40]!r} is unknown"
        raise _error(where, name, what, f"use one of {', '.join(allowed)}")
    counts["label spelling folded"] += 1
    return label


def _error(where: str, name: str, what: str, todo: str) -> DataError:
    return DataError(f"{where}, field {name}: {what}; {todo}.")


# Splits: by conversation.


def split_of(conversation_id: str, seed: int = 0, train: float = 0.8, validation: float = 0.1) -> str:
    """The split of a conversation by a hash of (seed, id) alone: whatever the order, the machine or the other ids."""
    digest = hashlib.sha256(f"{seed}:{conversation_id}".encode()).digest()
    uniform = int.from_bytes(digest[:6], "big") / 2**48
    return "train" if uniform < train else "validation" if uniform < train + validation else "test"


def _assign_splits(
    raw: list[Dialogue], path: Path, format: str, splits: str | Path | None, seed: int
) -> dict[str, str]:
    """The split of every conversation, "" for those that a splits file with a train list does not name."""
    if splits is None:
        return {d.conversation_id: d.split or split_of(d.conversation_id, seed, *FRACTIONS[format]) for d in raw}
    if splits == "official" and format != "mesc":
        raise DataError(f"{path}: only MESC has official splits; leave splits out or give the path of a splits file.")
    source = OFFICIAL if splits == "official" else local_path(splits)
    given = _check_keys(str(source), "", _json(str(source), _read_text(source)), SPLITS[1:], SPLITS[:1])
    known = {dialogue.conversation_id for dialogue in raw}
    split_by_id: dict[str, str] = {}
    for split, ids in given.items():
        for i in ids if isinstance(ids, list) else [ids]:
            if str(i) not in known or str(i) in split_by_id:
                what = "stands here twice" if str(i) in split_by_id else f"is no conversation of {path}"
                raise _error(str(source), split, f"{str(i)[:40]!r} {what}", "list ids that are in the data, each once")
            split_by_id[str(i)] = split
    return dict.fromkeys(known, "" if "train" in given else "train") | split_by_id


# Clean-up.


def _join(utterances: Iterable[Turn]) -> tuple[Turn, ...]:
    groups = [list(group) for _, group in groupby(utterances, key=lambda turn: turn.speaker)]
    return tuple(replace(group[-1], text=" ".join(turn.text for turn in group)) for group in groups)


def _clean_turns(utterances: Iterable[Turn], split: str, counts: Counter[str]) -> tuple[Turn, ...]:
    """`_join` of clean utterances. A turn that this empties is dropped from train, and stays as it was elsewhere."""
    turns: list[Turn] = []
    for _, group in groupby(utterances, key=lambda turn: turn.speaker):
        said = list(group)
        texts = [text for text in (clean_line(turn.text, counts) for turn in said) if text]
        if not texts and split != "train":
            counts["emptied turn kept as it was"] += 1
            texts = [turn.text for turn in said]
        counts.update(["emptied utterance dropped"] * (len(said) - len(texts)))
        turns += [replace(said[-1], text=" ".join(texts))] if texts else []
    return _join(turns)  # again: where a turn fell out, its neighbours are one speaker's
