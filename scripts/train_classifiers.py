"""The heads that read emotion and strategy on the frozen SFT model -> run_dir/classifiers, and what they are worth.

train_ppo.py and evaluate.py train them too where they are missing; only this script tests them, beside TF-IDF + logistic
regression and the majority class.
"""

import json
import shutil
import time

import rich.box
from rich.table import Table

from therapy_jax import classifiers, gpt2, run
from therapy_jax.config import Config
from therapy_jax.dialogue import exchanges
from therapy_jax.run import console


def main(config: Config) -> None:
    folder = run.start(config, "train_classifiers")
    began = time.monotonic()
    data = {
        split: [e for d in part for e in exchanges(d)]
        for split, part in run.read_data(config.data, config.seed).items()
    }
    gpt2_config, params, tokenizer = run.load_model(folder, "sft", config)
    where = folder / "classifiers"
    if where.exists():
        console.print(f"classifiers: {run.escape(str(where))} is made anew")
        shutil.rmtree(where)
    found = classifiers.load_or_train(folder, config, data, gpt2_config, params, tokenizer)
    seconds = time.monotonic() - began
    console.print(f"classifiers: trained in {seconds:.0f} s; testing ...")
    tested = classifiers.compare(found, data, params, tokenizer, model=gpt2.GPT2(gpt2_config), config=config)
    report = json.loads((where / "report.json").read_text(encoding="utf-8"))
    run.write_json(where / "report.json", {**report, "test": tested})
    run.note_environment(folder, "classifiers", seconds)
    console.print(table(tested))
    console.print(f"written: {run.escape(str(where))}")


def table(tested: dict[str, dict]) -> Table:
    """A row a head and a way to answer; accuracy and macro-F1 of the test split."""
    out = Table(title="classifiers, test split", title_justify="left", box=rich.box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for name in ("head", "answered by", "n", "accuracy", "macro-F1"):
        out.add_column(name, justify="right" if name in ("n", "accuracy", "macro-F1") else "left", no_wrap=True)
    for name, scores in tested.items():
        for i, (way, label) in enumerate(classifiers.WAYS.items()):
            if way in scores:
                cells = (f"{scores[way][key]:.4f}" for key in ("accuracy", "macro_f1"))
                out.add_row(name if i == 0 else "", label, str(scores["n"]) if i == 0 else "", *cells)
    return out


if __name__ == "__main__":
    run.main(main, __doc__ or "")
