"""The heads that read emotion and strategy on the frozen SFT model -> run_dir/classifiers, and what they are worth.

train_ppo.py and evaluate.py train them too where they are missing; only this script tests them, beside TF-IDF + logistic
regression and the majority class.
"""

from therapy_jax import run

if __name__ == "__main__":
    run.parse(__doc__)  # before jax is imported: --help and a misspelt key are answered at once

import json
import time
from collections import Counter
from typing import Any

import numpy as np
import rich.box
from etils import epath
from rich.table import Table

from therapy_jax import classifiers, files, gpt2, logs, origin, processes, report, stages, tfidf
from therapy_jax.config import Config
from therapy_jax.dialogue import Exchange, exchanges
from therapy_jax.run import console

WAYS = {"head": "head on the frozen trunk", "tfidf": "TF-IDF + logistic regression", "majority": "majority class"}


def main(config: Config) -> None:
    folder = run.start(config, "train_classifiers")
    began = time.monotonic()
    dialogues = run.read_data(config.data, config.seed)
    data = {split: [e for d in part for e in exchanges(d)] for split, part in dialogues.items()}
    origin.check(stages.model_of(folder, "sft"), config, dialogues["test"], "test")
    gpt2_config, params, tokenizer = stages.load_model(folder, "sft", config)
    where = folder / "classifiers"
    if processes.shared(where.exists()):
        console.print(f"classifiers: {run.escape(str(where))} is made anew")
        if processes.is_writer():
            # a cell's folder may be a link into another cell
            where.unlink() if not files.is_remote(where) and where.is_symlink() else epath.Path(where).rmtree()
        processes.wait_for_all("classifiers removed")
    found = classifiers.load_or_train(folder, config, data, gpt2_config, params, tokenizer)
    seconds = time.monotonic() - began
    console.print(f"classifiers: trained in {seconds:.0f} s; testing ...")
    tested = compare(found, data, params, tokenizer, model=gpt2.GPT2(gpt2_config), config=config)
    known = json.loads((where / "report.json").read_text(encoding="utf-8"))
    if processes.is_writer():
        files.write_json(where / "report.json", {**known, "test": tested})
    logs.note_environment(folder, "classifiers", seconds, went_on=False)
    console.print(table(tested))
    console.print(f"written: {run.escape(str(where))}")


def compare(
    found: classifiers.Classifiers, data: dict[str, list[Exchange]], params: Any, tokenizer: Any, *, model: gpt2.GPT2, config: Config
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Accuracy and macro-F1 of every head on the test split, beside TF-IDF + logistic regression on the same labels and
    utterances (class weights and C chosen on validation, as the heads are) and the commonest class of train. A head
    without labels in train or test is left out."""
    out: dict[str, dict[str, Any]] = {}
    for name, head in found.heads.items():
        texts, labels = classifiers.annotated(name, data["train"])
        tried = classifiers.annotated(name, data.get("validation", []))
        y = classifiers.label_ids(name, data.get("test", []))
        if not labels or not (y >= 0).any():
            continue
        x = classifiers.examples(name, data["test"], params, tokenizer, model=model, config=config)
        gold = [classifiers.CLASSES[name][i] for i in y[y >= 0]]
        head_params: Any = found.client_emotion if name == "client_emotion" else getattr(found.frozen, name)
        logits = np.asarray(head.apply({"params": head_params}, x[y >= 0]))
        grid = [(C, balanced) for balanced in (False, True) for C in (1.0, 3.0, 10.0, 30.0)]
        fitted = [tfidf.fit(texts, labels, config.seed, *choice) for choice in (grid if tried[1] else grid[:1])]
        best = (
            max(fitted, key=lambda f: classifiers.scores(f.predict(tried[0]), tried[1])["macro_f1"])
            if tried[1]
            else fitted[0]
        )
        answers = {
            "head": [classifiers.CLASSES[name][i] for i in logits.argmax(-1)],
            "tfidf": best.predict(classifiers.annotated(name, data["test"])[0]).tolist(),
            "majority": [Counter(labels).most_common(1)[0][0]] * len(gold),
        }
        out[name] = {"n": len(gold), **{way: classifiers.scores(said, gold) for way, said in answers.items()}}
        out[name]["tfidf"] |= dict(zip(("C", "balanced"), grid[fitted.index(best)], strict=True))
    return out


def table(tested: dict[str, dict]) -> Table:
    """A row a head and a way to answer; accuracy and macro-F1 of the test split."""
    out = Table(title="classifiers, test split", title_justify="left", box=rich.box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for name in ("head", "answered by", "n", "accuracy", "macro-F1"):
        out.add_column(name, justify="right" if name in ("n", "accuracy", "macro-F1") else "left", no_wrap=True)
    for name, scores in tested.items():
        for i, (way, label) in enumerate(WAYS.items()):
            if way in scores:
                cells = (f"{scores[way][key]:.4f}" for key in ("accuracy", "macro_f1"))
                out.add_row(name if i == 0 else "", label, str(scores["n"]) if i == 0 else "", *cells)
    return out


if __name__ == "__main__":
    run.main(report.after(main), __doc__)
