"""Reading: what the readers make of good files, what they say about bad ones, and that no conversation leaks."""

import csv
import json
import os
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from therapy_jax import dialogue as d

MESC_COLUMNS = "Utterance,Speaker,Emotion,Strategy,Dialogue_ID,Utterance_ID".split(",")
DATA = Path(os.environ.get("THERAPY_JAX_DATA") or Path(__file__).parents[2] / "shared" / "data")
needs_mesc = pytest.mark.skipif(
    not (DATA / "mesc" / "MESC.csv").exists(), reason="no MESC.csv: set THERAPY_JAX_DATA to the folder that holds mesc/"
)
needs_empathetic = pytest.mark.skipif(
    not (DATA / "empathetic_dialogues").exists(), reason="no empathetic_dialogues/ in THERAPY_JAX_DATA"
)


def client(text="I kept the letter.", emotion="joy", dialogue: int | str = 0, utterance: int | str = 0):
    return [text, "Client", emotion, "undefined", dialogue, utterance]


def therapist(text="What does it say?", emotion="neutral", strategy="Open question", dialogue=0, utterance=1):
    return [text, "Therapist", emotion, strategy, dialogue, utterance]


def mesc(folder, rows, columns=MESC_COLUMNS, name="MESC.csv"):
    with open(folder / name, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return folder / name


def empathetic(folder, rows, emotion="proud"):
    return mesc(folder, rows, ["Dialog_ID", "Type", "Actor", "Text"], f"{emotion}.csv").parent


def jsonl(folder, *records):
    path = folder / "talks.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n", encoding="utf-8")
    return path


def talk(id: object = "a", said="I kept the letter.", **more):
    return {"id": id, "turns": [{"speaker": "client", "text": said}, {"speaker": "therapist", "text": "Why?"}]} | more


def splits_file(folder, **ids):
    path = folder / "splits.json"
    path.write_text(json.dumps({"validation": [], "test": []} | ids))
    return path


def all_of(by_split):
    return [item for items in by_split.values() for item in items]


def only(by_split):
    (item,) = all_of(by_split)
    return item


# What is read.


def test_mesc_joins_utterances_and_takes_the_labels_of_the_last(tmp_path):
    rows = [
        client("I kept", "fear", utterance=0),
        client("the letter.", "joy", utterance=1),
        therapist("Yes.", "sadness", "Approval", utterance=2),
        therapist("What does it say?", "neutral", "Open question", utterance=3),
        client("Nothing.", "anger", utterance=4),
    ]
    dialogue = only(d.read_dialogues(mesc(tmp_path, rows)))
    turns = (
        d.Turn("client", "I kept the letter.", "joy", None),
        d.Turn("therapist", "Yes. What does it say?", "neutral", "Open question"),
        d.Turn("client", "Nothing.", "anger", None),
    )
    assert (dialogue.conversation_id, dialogue.turns, dialogue.problem) == ("0", turns, None)
    assert d.exchanges(dialogue) == [d.Exchange("0", (), turns[0], turns[1])]


def test_mesc_order_comes_from_the_ids_not_from_the_rows(tmp_path):
    rows = [
        (client if u % 2 else therapist)(f"{dialogue}: line {u}", dialogue=dialogue, utterance=u)
        for dialogue in (2, 10, 1)
        for u in range(12)
    ]
    tidy = d.read(mesc(tmp_path, rows))
    random.Random(3).shuffle(rows)
    assert d.read(mesc(tmp_path, rows)) == tidy
    last = [e for e in all_of(tidy) if e.conversation_id == "10"][-1]
    assert [turn.text for turn in last.context] == [f"10: line {u}" for u in range(9)]


def test_exchange_context_is_every_turn_before_it():
    speakers = ["client" if letter == "c" else "therapist" for letter in "tctccttc"]
    turns = tuple(d.Turn(speaker, str(i)) for i, speaker in enumerate(speakers))
    found = [
        (tuple(t.text for t in e.context), e.client.text, e.therapist.text) for e in d.exchanges(d.Dialogue("a", turns))
    ]
    assert found == [(("0",), "1", "2"), (("0", "1", "2", "3"), "4", "5")]


def test_empathetic_skips_situations_and_labels_only_the_client(tmp_path):
    rows = [
        ["x:1", "situation", "none", "I won a race."],
        ["x:1", "utterance", "speaker", "I won a race."],
        ["x:1", "utterance", "listener", "How far was it?"],
    ]
    dialogue = only(d.read_dialogues(empathetic(tmp_path, rows), format="empathetic"))
    assert dialogue.turns == (d.Turn("client", "I won a race.", "proud"), d.Turn("therapist", "How far was it?"))
    assert dialogue.conversation_id == "x:1"


def test_jsonl_reads_every_key_and_joins_turns(tmp_path):
    turns = [
        {"speaker": "client", "text": "I kept", "emotion": "fear"},
        {"speaker": "client", "text": "the\u2028letter.", "emotion": "joy"},  # a line separator that ends no line
        {"speaker": "therapist", "text": "Why?", "emotion": None, "strategy": "Open question"},
    ]
    record = {"id": "a", "problem": "grief", "split": "test", "turns": turns}
    path = jsonl(tmp_path, json.dumps(record, ensure_ascii=False))
    expected = (d.Turn("client", "I kept the letter.", "joy"), d.Turn("therapist", "Why?", None, "Open question"))
    assert only(d.read_dialogues(path, "jsonl")) == d.Dialogue("a", expected, "grief", "test")


def test_a_byte_order_mark_and_blank_lines_are_accepted(tmp_path):
    path = mesc(tmp_path, [client(), therapist()])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\r\n")
    assert only(d.read(path)).client.text == "I kept the letter."
    path = jsonl(tmp_path, "", talk(), "")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert only(d.read(path, "jsonl")).therapist.text == "Why?"


@pytest.fixture
def field_limit():
    before = csv.field_size_limit(1000)
    yield 1000
    csv.field_size_limit(before)


def test_a_huge_field_is_read_and_the_limit_of_the_process_stays(tmp_path, field_limit):
    huge = "long " * field_limit
    assert only(d.read(mesc(tmp_path, [client(huge), therapist()]), clean=False)).client.text == huge
    assert csv.field_size_limit() == field_limit
    with pytest.raises(d.DataError):
        d.read(mesc(tmp_path, [client()], columns=["Text"] * 6))
    assert csv.field_size_limit() == field_limit


def test_label_spelling_is_folded_and_counted_when_cleaning(tmp_path):
    path = mesc(tmp_path, [client(emotion="Joy"), therapist(strategy="open  question")])
    for clean, count in ((True, 2), (False, 0)):
        report = d.Report()
        exchange = only(d.read(path, clean=clean, report=report))
        assert (exchange.client.emotion, exchange.therapist.strategy) == ("joy", "Open question")
        assert report.counts["label spelling folded"] == count


def test_the_sample_covers_every_split_and_carries_labels():
    by_split = d.read(None, "jsonl")
    assert list(by_split) == ["train", "validation", "test"]
    assert all(by_split.values())
    assert {e.client.emotion for e in all_of(by_split)} <= {*d.EMOTIONS, None}
    assert {e.client.emotion for e in by_split["train"]} - {None}


# Clean-up.

KINDS = {
    "markup removed": [
        ("Do you know <i>Field Notes</i>?", "Do you know Field Notes?"),
        ("and then he left.</i>", "and then he left."),
        ('<font color="red">Stop</font> it.', "Stop it."),
        ("{\\an8}Stop it.", "Stop it."),
    ],
    "stage direction removed": [
        ("(Sighs)", ""),
        ("( Chuckles )", ""),
        ("(Rain on the roof)", ""),
        ("[inaudible] Tuesday.", "Tuesday."),
        ("Fine. (Clears throat)", "Fine."),
        ("( shouting in dutch ) Go!", "Go!"),
        ("Well (both laugh), yes.", "Well, yes."),
        ("Sighs) Fine.", "Fine."),
        ("(Sighs).", ""),
    ],
    "music notes removed": [("♪ ♫", ""), ("♪ over the hill ♪", "over the hill")],
    "leading colon removed": [(": Once.", "Once.")],
    "blanks at the ends removed": [(" Once. ", "Once."), ("Once.\u00a0", "Once.")],
    "runs of blanks joined": [("Once  or   twice", "Once or twice"), ("Once\tor\ntwice", "Once or twice")],
    "full-width punctuation replaced": [("Well，no。", "Well, no."), ("Yes。 No", "Yes. No")],
    "vertical bar replaced": [("Well|no", "Well, no"), ("Well || no", "Well, no")],
    "lone i capitalised": [
        ("so i said i'm off", "so I said I'm off"),
        ("i-i can't, can i?", "I-I can't, can I?"),
        ("Well...i 'i'", "Well...I 'I'"),
    ],
}


@pytest.mark.parametrize("kind, raw, tidy", [(kind, *case) for kind, cases in KINDS.items() for case in cases])
def test_clean_line_changes_and_counts(kind, raw, tidy):
    counts = Counter()
    assert d.clean_line(raw, counts) == tidy
    assert counts == {kind: 1}


@pytest.mark.parametrize(
    "line",
    [
        "So, a) I was late and",
        "b) I forgot. (My sister told me so)",
        "I waited (or something similar) for hours.",
        "<3 and 2 < 3 > 1",
        "You did what :|",
        "...",
        "?!",
        ":)",
        "8:30.",
        "Chopin, i.e. the piano, and i) the rest",
        "It's Henry VIII's wi-fi in Ii, said the p.i. in Rome.",
    ],
)
def test_clean_line_leaves_what_was_said(line):
    counts = Counter()
    assert d.clean_line(line, counts) == line
    assert not counts


def test_clean_line_ends_on_long_words():
    """A pattern that may cut a word in many places tries all of them, for years."""
    line = "(" + "a" * 5000 + " b c d e f"
    assert d.clean_line(line) == line


@given(st.text(alphabet="aiI b()[]<>/|:.,♪，。s\n\\{}"))
def test_clean_line_is_settled_about_blanks(line):
    tidy = d.clean_line(line)
    assert tidy == " ".join(tidy.split())
    assert not set(tidy) & set("♪，。\n")


def gesture_rows(dialogue, kept="I kept it."):
    return [
        client(kept, "joy", dialogue, 0),
        therapist("(Nods)", "neutral", "Approval", dialogue, 1),
        client("All of it.", "fear", dialogue, 2),
        client("(Sighs)", "sadness", dialogue, 3),
        therapist("Why?", dialogue=dialogue, utterance=4),
    ]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_cleaning_costs_no_exchange_outside_train(tmp_path, split):
    path = mesc(tmp_path, [*gesture_rows(0, "I sold it."), *gesture_rows(1), *gesture_rows(2)])
    splits = splits_file(tmp_path, **{split: [1, 2]})
    report = d.Report()
    by_split = d.read(path, splits=splits, report=report)

    def said(split):
        return [(e.client.text, e.client.emotion, e.therapist.text) for e in by_split[split]]

    # In train the emptied therapist turn goes, and the client's turns around it become one. Elsewhere it stays.
    # The label of the last utterance holds in both, even where that utterance has no words.
    assert said(split) == [("I kept it.", "joy", "(Nods)"), ("All of it.", "sadness", "Why?")] * 2
    assert said("train") == [("I sold it. All of it.", "sadness", "Why?")]
    assert report.counts == {
        "stage direction removed": 6,
        "emptied utterance dropped": 4,
        "emptied turn kept as it was": 2,
    }
    assert len(d.read(path, splits=splits, clean=False)["train"]) == 2
    assert d.read(path, splits=splits, clean=False)[split][1].client.text == "All of it. (Sighs)"


def test_a_conversation_of_gestures_alone_is_dropped_from_train_only(tmp_path):
    path = mesc(tmp_path, [client("(Sighs)", dialogue=0), client("(Sighs)", dialogue=1)])
    report = d.Report()
    by_split = d.read_dialogues(path, splits=splits_file(tmp_path, test=[1]), report=report)
    assert [len(v) for v in by_split.values()] == [0, 0, 1]
    assert report.counts["empty conversation dropped"] == 1


def test_duplicates_leave_train_and_nothing_else(tmp_path):
    path = jsonl(tmp_path, *(talk(i, said) for i, said in zip("abcdefg", "1121323", strict=True)))
    splits = splits_file(tmp_path, validation=["c"], test=["g"])
    report = d.Report()
    by_split = d.read_dialogues(path, "jsonl", splits, report=report)
    # a, b, d say 1: the first stays. c says 2 in validation, so f goes; g says 3 in test, so e goes.
    assert {split: [x.conversation_id for x in found] for split, found in by_split.items()} == {
        "train": ["a"],
        "validation": ["c"],
        "test": ["g"],
    }
    assert report.counts == {"duplicate conversation dropped": 4}
    assert len(d.read_dialogues(path, "jsonl", splits, clean=False)["train"]) == 5


def test_a_conversation_in_test_is_found_in_train_whatever_cleaning_leaves_of_it(tmp_path):
    """Train drops the turn that is emptied, test keeps it: the same conversation still."""
    path = mesc(tmp_path, [*gesture_rows(0), *gesture_rows(1), *gesture_rows(2, "I sold it.")])
    report = d.Report()
    by_split = d.read(path, splits=splits_file(tmp_path, test=[1]), report=report)
    assert [x.conversation_id for x in by_split["train"]] == ["2"]
    assert report.counts["duplicate conversation dropped"] == 1


def test_one_id_in_two_files_is_not_one_conversation(tmp_path):
    rows = [["1", "utterance", "speaker", "Hello."], ["1", "utterance", "listener", "Hi."]]
    folder = empathetic(tmp_path, rows)
    empathetic(tmp_path, rows, "sad")
    with pytest.raises(d.DataError, match=r"sad.csv, line 2.*Dialog_ID.*stands in proud.csv too"):
        d.read_dialogues(folder, "empathetic")


def test_a_path_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    jsonl(tmp_path, *(talk(i, i) for i in "abc"))
    splits_file(tmp_path, test=["c"])
    by_split = d.read_dialogues("~/talks.jsonl", "jsonl", "~/splits.json")
    assert [len(by_split[split]) for split in d.SPLITS] == [2, 0, 1]
    with pytest.raises(d.DataError, match="~nobody-here/talks.jsonl does not exist"):
        d.read_dialogues("~nobody-here/talks.jsonl", "jsonl")


def test_report_lines_start_with_the_commonest_change():
    report = d.Report(Counter(rare=1, common=1234), ["row 5"])
    assert report.lines() == ["  1,234  common", "      1  rare", "skipped: row 5"]


# Splits.


@given(st.lists(st.text(min_size=1), unique=True), st.integers(), st.randoms())
def test_hash_split_depends_on_seed_and_id_alone(ids, seed, order):
    first = {i: d.split_of(i, seed) for i in ids}
    order.shuffle(ids)
    assert {i: d.split_of(i, seed) for i in ids} == first
    assert set(first.values()) <= set(d.SPLITS)


def test_hash_split_is_the_same_on_every_machine():
    expected = ["test", "validation", "train", "train", "train", "validation", "test", "train"]
    assert [d.split_of(str(i), seed=7) for i in range(8)] == expected
    assert {d.split_of("a", 0, 1.0, 0.0), d.split_of("a", 0, 0.0, 1.0), d.split_of("a", 0, 0.0, 0.0)} == set(d.SPLITS)


@pytest.mark.parametrize("format, train, validation", [("jsonl", 0.8, 0.1), ("empathetic", 0.9, 0.05)])
def test_hash_split_has_the_promised_shares_and_moves_with_the_seed(tmp_path, format, train, validation):
    n = 3000
    if format == "jsonl":
        path = jsonl(tmp_path, *(talk(str(i)) for i in range(n)))
    else:
        path = empathetic(tmp_path, [[i, "utterance", "speaker", "Hello there."] for i in range(n)])
    shares = {}
    for seed in (0, 1):
        by_split = d.read_dialogues(path, format, clean=False, seed=seed)
        ids = [{x.conversation_id for x in by_split[split]} for split in d.SPLITS]
        assert len(set.union(*ids)) == sum(map(len, ids)) == n
        assert all(x.split == split for split in d.SPLITS for x in by_split[split])
        shares[seed] = ids
        for found, share in zip(ids, (train, validation, 1 - train - validation), strict=True):
            assert abs(len(found) / n - share) < 4 * (share * (1 - share) / n) ** 0.5  # four standard deviations
    assert shares[0] != shares[1]


@settings(deadline=None, max_examples=40)  # writes files
@given(st.lists(st.integers(0, 30), min_size=1, unique=True), st.integers(0, 9), st.randoms())
def test_no_conversation_crosses_splits_whatever_else_is_in_the_file(tmp_path_factory, ids, seed, order):
    folder = tmp_path_factory.mktemp("cross")
    rows = [row for i in ids for row in (client(f"I am {i}.", dialogue=i), therapist(f"Are you {i}?", dialogue=i))]
    by_split = d.read(mesc(folder, rows), seed=seed)
    home = {e.conversation_id: split for split, found in by_split.items() for e in found}
    assert len(home) == len(all_of(by_split)) == len(ids)
    kept = [row for row in rows if row[-2] == ids[0]]
    assert only(d.read(mesc(folder, kept), seed=seed)) in by_split[home[str(ids[0])]]


def test_splits_file_rules(tmp_path):
    path = jsonl(tmp_path, talk("a", "1"), talk("b", "2"), talk("7", "3"))

    def ids(**splits):
        found = d.read_dialogues(path, "jsonl", splits_file(tmp_path, **splits), report=report)
        return {split: [x.conversation_id for x in found[split]] for split in d.SPLITS}

    report = d.Report()
    assert ids(validation=["b"], test=[7]) == {"train": ["a"], "validation": ["b"], "test": ["7"]}
    assert not report.counts
    assert ids(train=["b"], test=["a"]) == {"train": ["b"], "validation": [], "test": ["a"]}
    assert report.counts == {"conversation in no split left out": 1}
    for bad, words in [
        ({"test": ["zz"]}, "'zz' is no conversation"),
        ({"validation": ["a"], "test": ["a"]}, "'a' stands here twice"),
        ({"test": ["a", "a"]}, "'a' stands here twice"),
        ({"test": [True]}, "'True' is no conversation"),
        ({"test": None}, "'None' is no conversation"),
        ({"test": {"a": 1}}, "is no conversation"),
        ({"dev": ["a"]}, "unknown key"),
    ]:
        with pytest.raises(d.DataError, match=words) as caught:
            ids(**bad)
        assert "splits.json" in str(caught.value) and f"field {[*bad][-1]}" in str(caught.value)
    (tmp_path / "splits.json").write_text('{"test": []}')
    with pytest.raises(d.DataError, match=r"splits\.json.*field validation.*missing"):
        d.read(path, "jsonl", tmp_path / "splits.json")
    (tmp_path / "splits.json").write_text('{"test": [')
    with pytest.raises(d.DataError, match=r"splits\.json: broken JSON"):
        d.read(path, "jsonl", tmp_path / "splits.json")
    with pytest.raises(d.DataError, match="only MESC"):
        d.read(path, "jsonl", "official")
    with pytest.raises(d.DataError, match=r"mesc\.json, field validation: .* is no conversation"):
        d.read(mesc(tmp_path, [client()]), splits="official")


def test_a_splits_file_outranks_the_split_keys(tmp_path):
    path = jsonl(tmp_path, talk("a", "1", split="test"), talk("b", "2", split="train"))
    assert [x.conversation_id for x in d.read(path, "jsonl")["test"]] == ["a"]
    assert [x.conversation_id for x in d.read(path, "jsonl", splits_file(tmp_path, test=["b"]))["test"]] == ["b"]


def test_official_ids_are_whole_and_disjoint():
    ids = json.loads(d.OFFICIAL.read_text())
    assert list(ids) == ["validation", "test"]
    assert len({*ids["validation"], *ids["test"]}) == 204 == sum(map(len, ids.values()))


# Bad input: file, line and field in the message, which never quotes what was said.

BAD_MESC = [
    (["Well.", "Doctor", "joy", "undefined", 0, 1], "Speaker", "'Doctor' is unknown"),
    (client(emotion="hapy", utterance=1), "Emotion", "'hapy' is unknown; use one of neutral, depression"),
    (client(emotion="", utterance=1), "Emotion", "missing"),
    (therapist(strategy="Hypnosis"), "Strategy", "'Hypnosis' is unknown"),
    (therapist(strategy="undefined"), "Strategy", "'undefined' is unknown"),
    (client("  ", utterance=1), "Utterance", "blank"),
    (client("", utterance=1), "Utterance", "missing"),
    (client(dialogue="1.0"), "Dialogue_ID", "'1.0' is not a whole number"),
    (client(utterance="²"), "Utterance_ID", "not a whole number"),
    (client(utterance=0), "Utterance_ID", "0 stands twice"),
    (client(utterance=1)[:4], "Dialogue_ID", "4 fields, the header 6"),
    ([*client(utterance=1), "x"], "Utterance_ID", "7 fields, the header 6"),
]


@pytest.mark.parametrize("row, field, words", BAD_MESC)
def test_a_bad_mesc_row_is_named_or_skipped(tmp_path, row, field, words):
    # The first utterance spans two lines of the file, so line and row numbers differ: the bad row is on line 4.
    good = [client("Please open\nthe secret letter.")], [therapist("Why not?", utterance=2)]
    path = mesc(tmp_path, [*good[0], row, *good[1]])
    with pytest.raises(d.DataError) as caught:
        d.read(path)
    message = str(caught.value)
    assert f"MESC.csv, line 4, field {field}: " in message and words in message
    assert message.endswith("or leave out such rows with on_bad_row='skip'.") and "secret" not in message
    report = d.Report()
    exchange = only(d.read(path, on_bad_row="skip", report=report, clean=False))
    assert (exchange.client.text, exchange.therapist.text) == ("Please open\nthe secret letter.", "Why not?")
    assert report.counts == {"bad row skipped": 1}
    assert len(report.skipped) == 1 and f"line 4, field {field}: " in report.skipped[0]
    assert report.lines() == ["      1  bad row skipped", f"skipped: {report.skipped[0]}"]


BAD_JSON = [
    ('{"id": "b", "turns": [', "", "broken JSON"),
    ("[" * 100_000, "", "broken JSON"),
    ("[1]", "(all)", "not a JSON object"),
    ({"turns": talk()["turns"]}, "id", "missing"),
    ({"id": "b"}, "turns", "missing"),
    (talk(7), "id", "not a text"),
    (talk("a"), "id", "'a' stands on an earlier line"),
    (talk("b", mood="low"), "mood", "unknown key"),
    (talk("b", problem=3), "problem", "not a text"),
    (talk("b", turns=[]), "turns", "not a list"),
    (talk("b", turns="hello"), "turns", "not a list"),
    (talk("b", split="dev"), "split", "on some lines only"),
]
BAD_TURNS = [
    ("hello", "turns[1]", "not a JSON object"),
    ({"speaker": "client"}, "turns[1].text", "missing"),
    ({"text": "Well."}, "turns[1].speaker", "missing"),
    ({"speaker": "user", "text": "Well."}, "turns[1].speaker", "'user' is unknown"),
    ({"speaker": None, "text": "Well."}, "turns[1].speaker", "missing"),
    ({"speaker": "client", "text": " "}, "turns[1].text", "blank"),
    ({"speaker": "client", "text": "\ud83d"}, "turns[1].text", "surrogate"),
    ({"speaker": "client", "text": "Well.", "emotion": "proud"}, "turns[1].emotion", "'proud' is unknown"),
    ({"speaker": "client", "text": "Well.", "emotion": ["joy"]}, "turns[1].emotion", "is unknown"),
    ({"speaker": "client", "text": "Well.", "strategy": "Hypnosis"}, "turns[1].strategy", "'Hypnosis' is unknown"),
    ({"speaker": "client", "text": "Well.", "name": "Ada"}, "turns[1].name", "unknown key"),
]


@pytest.mark.parametrize("record, field, words", BAD_JSON)
def test_a_bad_json_line_is_named_or_skipped(tmp_path, record, field, words):
    path = jsonl(tmp_path, talk("a"), "", record, talk("c", "Another."))
    with pytest.raises(d.DataError) as caught:
        d.read(path, "jsonl")
    message = str(caught.value)
    assert f"talks.jsonl, line 3{f', field {field}' if field else ''}: " in message and words in message
    report = d.Report()
    found = all_of(d.read(path, "jsonl", on_bad_row="skip", report=report))
    assert {e.conversation_id for e in found} == {"a", "c"} and len(report.skipped) == 1


@pytest.mark.parametrize("entry, field, words", BAD_TURNS)
def test_a_bad_json_turn_costs_that_turn_alone(tmp_path, entry, field, words):
    turns = talk("b", "Another.")["turns"]
    path = jsonl(tmp_path, talk("a"), talk("b", turns=[turns[0], entry, turns[1]]))
    with pytest.raises(d.DataError) as caught:
        d.read(path, "jsonl")
    message = str(caught.value)
    assert f"talks.jsonl, line 2, field {field}: " in message and words in message
    assert message.count("on_bad_row") == 1
    report = d.Report()
    found = all_of(d.read(path, "jsonl", on_bad_row="skip", report=report))
    assert {e.client.text for e in found} == {"I kept the letter.", "Another."} and len(report.skipped) == 1


@pytest.mark.parametrize(
    "row, field, words",
    [
        (["", "utterance", "speaker", "Well."], "Dialog_ID", "missing"),
        (["b", "remark", "speaker", "Well."], "Type", "'remark' is unknown"),
        (["b", "utterance", "none", "Well."], "Actor", "'none' is unknown"),
        (["b", "utterance", "speaker", ""], "Text", "missing"),
        (["b", "utterance", "speaker"], "Text", "3 fields, the header 4"),
    ],
)
def test_a_bad_empathetic_row_is_named_or_skipped(tmp_path, row, field, words):
    good = ["a", "utterance", "speaker", "I won a race."], ["a", "utterance", "listener", "How far was it?"]
    folder = empathetic(tmp_path, [good[0], row, good[1]])
    with pytest.raises(d.DataError) as caught:
        d.read(folder, "empathetic")
    assert f"proud.csv, line 3, field {field}: " in str(caught.value) and words in str(caught.value)
    assert only(d.read(folder, "empathetic", on_bad_row="skip")).client.emotion == "proud"


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_a_file_that_cannot_be_used_is_named(tmp_path, on_bad_row):
    def message(path, format="mesc"):
        with pytest.raises(d.DataError) as caught:
            d.read(path, format, on_bad_row=on_bad_row)
        assert str(Path(path).name) in str(caught.value)
        return str(caught.value)

    path = tmp_path / "MESC.csv"
    assert "does not exist" in message(path)
    assert "does not exist" in message(path, "jsonl")
    assert "does not exist" in message(tmp_path / "nowhere", "empathetic")
    assert "is a folder" in message(tmp_path)
    assert "is a folder" in message(tmp_path, "jsonl")
    assert "holds no CSV file" in message(tmp_path, "empathetic")
    for empty in (b"", b"\xef\xbb\xbf\r\n"):
        path.write_bytes(empty)
        assert "is empty" in message(path) and "is empty" in message(path, "jsonl")
    assert "is a file" in message(path, "empathetic")
    assert "none of the 32 emotions" in message(tmp_path, "empathetic").replace(str(path), path.parent.name)

    assert "no usable row" in message(mesc(tmp_path, []))
    assert "line 1, field Emotion: 0 columns" in message(mesc(tmp_path, [], ["Utterance", "Speaker"] + ["x"] * 4))
    assert "line 1, field Speaker: 2 columns" in message(mesc(tmp_path, [], [*MESC_COLUMNS, "Speaker"]))
    mesc(tmp_path, [client(), therapist("voilà")])
    path.write_bytes(path.read_bytes().decode().encode("latin-1"))
    offset = path.read_bytes().index(b"\xe0")
    assert f"line 3: byte {offset} is not UTF-8" in message(path)
    mesc(tmp_path, [client(), therapist()])
    path.write_text(path.read_text() + '"an open quote,Client,joy,undefined,0,3\nand so on\n')
    assert "line 5: broken quoting" in message(path)


def test_a_file_of_nothing_but_bad_rows_is_refused(tmp_path):
    with pytest.raises(d.DataError, match=r"MESC\.csv holds no usable row"):
        d.read(mesc(tmp_path, [client(emotion="hapy")]), on_bad_row="skip")


def test_arguments_that_do_not_exist_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'xml'; choose one of mesc, empathetic, jsonl"):
        d.read(tmp_path, "xml")
    with pytest.raises(ValueError, match="'ignore'; choose error or skip"):
        d.read(None, "jsonl", on_bad_row="ignore")
    with pytest.raises(d.DataError, match="path is missing"):
        d.read(None, "mesc")


# The real files, where they are.


@pytest.fixture(scope="module")
def real():
    path, report = DATA / "mesc" / "MESC.csv", d.Report()
    raw = d.read_dialogues(path, splits="official", clean=False)
    return raw, d.read_dialogues(path, splits="official", report=report), report


def pairs(by_split):
    return {split: [e for x in by_split[split] for e in d.exchanges(x)] for split in d.SPLITS}


@needs_mesc
def test_official_mesc_has_the_published_counts(real):
    raw, _, _ = real
    utterances = Counter()
    home = {x.conversation_id: split for split in d.SPLITS for x in raw[split]}
    with open(DATA / "mesc" / "MESC.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            utterances[home[row["Dialogue_ID"]], row["Speaker"]] += 1
    found = {
        split: (
            len(raw[split]),
            utterances[split, "Client"],
            utterances[split, "Therapist"],
            *(sum(t.speaker == s for x in raw[split] for t in x.turns) for s in ("client", "therapist")),
            len(pairs(raw)[split]),
        )
        for split in d.SPLITS
    }
    assert found == {
        "train": (815, 14874, 8252, 4335, 3803, 3721),
        "validation": (102, 1713, 1001, 522, 452, 445),
        "test": (102, 1849, 1073, 534, 460, 454),
    }
    words = [len(e.client.text.split()) for e in pairs(raw)["test"]]
    assert (round(sum(words) / len(words), 1), max(words)) == (23.9, 352)  # so no utterance was lost in joining


@needs_mesc
def test_official_mesc_test_replies_are_nearly_all_neutral(real):
    raw, clean, _ = real
    for by_split in (raw, clean):
        labels = Counter(e.therapist.emotion for e in pairs(by_split)["test"])
        assert labels == {"neutral": 451, "sadness": 3}


@needs_mesc
def test_cleaning_mesc_keeps_validation_and_test_whole(real):
    raw, clean, _ = real

    def shape(x):
        return [(x.conversation_id, t.speaker, t.emotion, t.strategy) for t in x.turns]

    for split in ("validation", "test"):
        assert [shape(x) for x in clean[split]] == [shape(x) for x in raw[split]]
    train = {x.conversation_id for x in clean["train"]}
    assert {x.conversation_id for x in raw["train"]} - train == {"193"}


@needs_mesc
def test_cleaning_mesc_finds_the_known_defects(real):
    counts = real[2].counts
    known = {
        "markup removed": 36,
        "stage direction removed": 23,
        "music notes removed": 1,
        "leading colon removed": 4,
        "blanks at the ends removed": 11,
        "runs of blanks joined": 2,
        "full-width punctuation replaced": 2,
        "label spelling folded": 3,
        "duplicate conversation dropped": 1,
    }
    assert {kind: counts[kind] for kind in known} == known
    assert counts["emptied utterance dropped"] + counts["emptied turn kept as it was"] == 17 + 1  # 17 gestures, 1 song


@needs_mesc
def test_no_mesc_conversation_crosses(real):
    for by_split in (real[0], real[1], d.read_dialogues(DATA / "mesc" / "MESC.csv", clean=False)):
        ids = [{x.conversation_id for x in found} for found in by_split.values()]
        assert sum(map(len, ids)) == len(set.union(*ids)) >= 1018


@needs_empathetic
def test_empathetic_has_the_published_counts():
    by_split = d.read_dialogues(DATA / "empathetic_dialogues", "empathetic", clean=False)
    dialogues = all_of(by_split)
    assert len({x.conversation_id for x in dialogues}) == len(dialogues) == 24_856
    assert {t.emotion for x in dialogues for t in x.turns if t.speaker == "client"} == set(d.EMPATHETIC_EMOTIONS)
    assert len(all_of(pairs(by_split))) == 51_263
    assert [round(len(found) / len(dialogues), 2) for found in by_split.values()] == [0.9, 0.05, 0.05]
