"""The examples at the head of the modules run, and say what they promise."""

import doctest
import importlib
from pathlib import Path

import pytest

import therapy_jax

ROOT = Path(therapy_jax.__file__).parent
WITH_EXAMPLES = [
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts)
    for path in sorted(ROOT.rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_the_examples_of_a_module(name):
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted and not results.failed


def test_modules_have_examples():
    assert len(WITH_EXAMPLES) > 10
