"""English sentences that lie on every machine: the docstrings of Python and of the installed packages.

Nothing is downloaded and nothing is imported or run: source files are parsed where they lie.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

PACKAGES = ("numpy", "pandas", "scipy", "sklearn", "torch", "transformers")
"""Packages with much documentation in their source, read beside Python's own library where they are installed."""

_MARKUP = re.compile(r":[a-z:+]+:`~?([^`<]+)[^`]*`|`+~?([^`]+)`+|\[([^\]]+)\]\([^)]*\)|\*\*?([^*\s][^*]*)\*\*?")
_SENTENCE_END = re.compile(r"(?<=[a-z0-9)][.!?])\s+(?=[A-Z])")
# No colon and no double dash: these stand in lists of arguments and under headings.
_PROSE = re.compile(r"(?!.*--)[A-Z][A-Za-z0-9 ,;'\"()/%-]*[.!?]")


def docstring_sentences(packages: Iterable[str] = PACKAGES) -> list[str]:
    """Distinct English sentences of 5 to 40 words from docstrings, in the order of their hashes.

    The files are parsed by processes of their own, so a script that calls this must guard its entry point with
    `if __name__ == "__main__":`.

    Args:
        packages: names of packages to read beside Python's standard library; those not installed are passed over.
    """
    files = sorted(path for root in _roots(packages) for path in _python_files(root))
    found: dict[bytes, str] = {}
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:  # forking a process with threads may hang
        for sentences in pool.map(sentences_of_file, files, chunksize=64):
            for sentence in sentences:
                found[hashlib.sha256(sentence.lower().encode()).digest()] = sentence
    return [found[digest] for digest in sorted(found)]


def _roots(packages: Iterable[str]) -> Iterator[Path]:
    yield Path(sysconfig.get_path("stdlib"))
    for name in packages:
        spec = importlib.util.find_spec(name)
        if spec is not None:
            yield from map(Path, spec.submodule_search_locations or ())


def _python_files(root: Path) -> Iterator[Path]:
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if not {"site-packages", "tests", "test", "testing"} & set(parts):
            yield path


def sentences_of_file(path: Path) -> list[str]:
    """The sentences of all docstrings of one source file; none if it cannot be parsed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other people's invalid escapes
            tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented))
    return [sentence for text in docstrings if text for sentence in prose_sentences(text)]


def prose_sentences(text: str) -> list[str]:
    """The sentences of a docstring that are plain English: no code, lists of arguments, tables or formulas."""
    sentences = []
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        if ">>>" in paragraph or "::" in paragraph:
            continue
        plain = _MARKUP.sub(lambda match: next(filter(None, match.groups()), ""), " ".join(paragraph.split()))
        for sentence in _SENTENCE_END.split(plain):
            words = sentence.split()
            letters = sum(character.isalpha() for character in sentence)
            if 5 <= len(words) <= 40 and letters >= 0.7 * len(sentence) and _PROSE.fullmatch(sentence):
                sentences.append(sentence)
    return sentences
