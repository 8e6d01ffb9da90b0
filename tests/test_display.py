"""Tables and pictures whatever the numbers are."""

import pytest
from rich.console import Console

from kronecker_transformers.display import check_picture, distillation_table


def test_scores_may_be_0(capsys):
    rows = {"parameters": [90, 45], "matthews_correlation": [0.5, 0.0], "examples per second": [10.0, 25.0]}
    Console(width=100).print(distillation_table(7, ["teacher", "student"], rows))
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.split()}
    assert lines["parameters"] == ["90", "45", "2.00x"]
    assert lines["matthews_correlation"] == ["0.5", "0"]
    assert lines["examples"] == ["per", "second", "10", "25", "2.50x"]


def test_a_picture_needs_an_ending(tmp_path):
    with pytest.raises(ValueError, match=r"has no ending that says its format; give it one of .*png"):
        check_picture(tmp_path / "picture")
    with pytest.raises(ValueError, match=r"must not end in .txt.; give it one of .*png"):
        check_picture(tmp_path / "picture.txt")
