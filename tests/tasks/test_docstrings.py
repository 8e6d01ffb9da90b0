import sys

import pytest

from kronecker_transformers.tasks import docstrings
from kronecker_transformers.tasks.docstrings import docstring_sentences, prose_sentences, sentences_of_file

DOCSTRING = """
Compute the mean of all rows. The result is a vector, not a matrix.

See the function :func:`mean` for the details of ``dim`` and of **keepdim**.
This line continues the paragraph
and ends here. Too short.

Args:
    x (int): This text describes an argument of the function.

>>> print("This is not English prose at all.")
Neither is this output of the line above.

Example code follows here::

    for i in range(3): print(i)

Parameters
----------
x : int
    The number of rows that are read at once.

| a | table | with | some | columns |.
"""


def test_only_plain_sentences_are_kept():
    assert prose_sentences(DOCSTRING) == [
        "Compute the mean of all rows.",
        "The result is a vector, not a matrix.",
        "See the function mean for the details of dim and of keepdim.",
        "This line continues the paragraph and ends here.",
    ]


def test_every_docstring_of_a_file_and_nothing_else(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        '"""The module does one thing well."""\n'
        "# A comment that is a good English sentence.\n"
        'text = "A string that is a good English sentence."\n'
        "class A:\n"
        '    """The class keeps what it was given."""\n'
        "    async def f(self):\n"
        '        """Return the answer to the question."""\n'
        "raise RuntimeError('this file must not be run')\n"
    )
    assert sentences_of_file(file) == [
        "The module does one thing well.",
        "The class keeps what it was given.",
        "Return the answer to the question.",
    ]


@pytest.mark.parametrize("content", [b"def broken(:", b"\xff\xfe\x00", b"x = 1\x00"])
def test_unreadable_files_are_passed_over(tmp_path, content):
    file = tmp_path / "module.py"
    file.write_bytes(content)
    assert sentences_of_file(file) == []


def test_every_sentence_once_in_an_order_of_its_own(tmp_path, monkeypatch):
    for package, count in (("first", 400), ("second", 100)):
        folder = tmp_path / package
        folder.mkdir()
        lines = "\n\n".join(f"The number of items in the basket is {i}." for i in range(count))
        (folder / "__init__.py").write_text(f'"""{lines}"""\n')
        (folder / "tests").mkdir()
        (folder / "tests" / "case.py").write_text('"""A sentence that stands in a test only."""\n')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(docstrings.sysconfig, "get_path", lambda name: str(tmp_path / "second"))

    both = docstring_sentences(["first", "second", "not_installed_anywhere"])
    assert len(both) == len(set(both)) == 400  # every sentence once, none of the tests
    fewer = docstring_sentences([])
    assert len(fewer) == 100
    assert fewer == [sentence for sentence in both if sentence in set(fewer)]
    assert "first" not in sys.modules
