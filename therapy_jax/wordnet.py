"""WordNet, whose synonyms METEOR counts as matches: found among nltk's data, or made of the files that Debian ships. Nothing is
downloaded: a metric that fetches its dictionary is another metric on the day that it cannot."""

import shutil
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path

import nltk.data
from nltk.corpus.reader.wordnet import WordNetCorpusReader

from therapy_jax.files import cache_folder

DEBIAN = Path("/usr/share/wordnet")  # Debian packages wordnet-base and wordnet-sense-index
_PARTS = ("adj", "adv", "noun", "verb")
_NEEDED = [f"{kind}.{part}" for kind in ("data", "index") for part in _PARTS] + [f"{part}.exc" for part in _PARTS]
_OPTIONAL = ["cntlist.rev", "index.sense"]
# WordNet's list of lexicographer files (manual page lexnames(5WN)), which Debian leaves out of the package.
_LEXNAMES = (
    "adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute noun.body noun.cognition "
    "noun.communication noun.event noun.feeling noun.food noun.group noun.location noun.motive noun.object noun.person "
    "noun.phenomenon noun.plant noun.possession noun.process noun.quantity noun.relation noun.shape noun.state "
    "noun.substance noun.time verb.body verb.change verb.cognition verb.communication verb.competition "
    "verb.consumption verb.contact verb.creation verb.emotion verb.motion verb.perception verb.possession verb.social "
    "verb.stative verb.weather adj.ppl"
).split()


class _WordNet(WordNetCorpusReader):
    def map_wn(self, version: str = "wordnet") -> None:
        """The mapping between WordNet releases serves other languages only, and reading it takes seconds."""


def install(target_dir: str | Path, source: str | Path | None = None) -> Path:
    """Makes `target_dir`/corpora/wordnet, as nltk reads it, from the files of Debian's wordnet-base; returns it.

    The files are copied, because nltk refuses links that lead out of its data folder, and no one else may write to
    them, because nltk refuses that as well. Raises FileNotFoundError where `source` lacks a file.
    """
    root, source = Path(target_dir), Path(source or DEBIAN)
    final = root / "corpora" / "wordnet"
    if final.is_dir():
        return final
    if missing := [name for name in _NEEDED if not (source / name).is_file()]:
        raise FileNotFoundError(f"no WordNet in {source}: it lacks {', '.join(missing)} (Debian: wordnet-base)")
    root.mkdir(mode=0o755, parents=True, exist_ok=True)
    final.parent.mkdir(mode=0o755, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=root))  # renamed at the end: another process never sees half a dictionary
    try:
        for name in _NEEDED + [name for name in _OPTIONAL if (source / name).is_file()]:
            shutil.copyfile(source / name, staging / name)
        lines = (
            f"{i:02}\t{name}\t{1 + ('noun verb adj adv'.split()).index(name.split('.')[0])}\n"
            for i, name in enumerate(_LEXNAMES)
        )
        (staging / "lexnames").write_text("".join(lines))
        for file in staging.iterdir():
            file.chmod(0o644)
        staging.chmod(0o755)
        staging.rename(final)
    except OSError:
        if not final.is_dir():  # else another process was quicker, and its copy serves
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return final


def cache_dir() -> Path:
    """Where `reader` keeps its copy."""
    return cache_folder() / "nltk_data"


@lru_cache(maxsize=1)
def reader() -> WordNetCorpusReader | None:
    """WordNet from nltk's data folders, or from Debian's files by way of `cache_dir()`; None where there is neither."""
    found = next((opened for folder in list(nltk.data.path) if (opened := _open(folder)) is not None), None)
    if found is not None:
        return found
    cache = cache_dir()
    if DEBIAN.is_dir():
        try:
            install(cache)
        except OSError as error:
            warnings.warn(f"WordNet could not be copied to {cache}: {error}", stacklevel=2)
    return _open(str(cache))


def _open(folder: str) -> WordNetCorpusReader | None:
    for name in ("corpora/wordnet", "corpora/wordnet.zip/wordnet/"):
        try:
            found = nltk.data.find(name, [folder])
            if folder not in nltk.data.path:
                nltk.data.path.append(folder)  # nltk opens no file outside its path
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # "multilingual functions are not available": not needed
                return _WordNet(found, None)
        except (LookupError, OSError, ValueError):  # absent, incomplete, or refused
            continue
    return None
