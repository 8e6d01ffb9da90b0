"""README and docs: every link leads somewhere, and every snippet of the README runs as it stands."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from distilling_text import saved_teacher, text_file
from students import CAN_EXPORT
from tiny import bert_tokenizer
from transformers import BertForSequenceClassification, BertModel

from kronecker_transformers import compress
from kronecker_transformers.checkpoint.load import save_folder
from kronecker_transformers.cli import _parser, main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text()
COMMAND = re.compile(r"^ {4}(kronecker-transformers [^#\n]*)", re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("http", "#")):
            path, _, anchor = target.partition("#")
            assert (page.parent / path).exists(), target
            headings = re.findall(r"^#+ (.*)$", (page.parent / path).read_text(), re.MULTILINE) if anchor else []
            slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert not anchor or anchor in slugs, target


def test_readme_is_short():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_are_known(page):
    for command in COMMAND.findall(page.read_text()):
        _parser().parse_args(shlex.split(command)[1:])  # exits with an error for an unknown one


def test_snippets_of_the_readme(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    (tmp_path / "path" / "to").mkdir(parents=True)
    place = tmp_path / "path" / "to" / "teacher"
    teacher = saved_teacher(BertForSequenceClassification, place, max_position_embeddings=128)
    text_file(tmp_path).rename(tmp_path / "sentences.txt")
    encoder = compress(saved_teacher(BertModel, tmp_path / "encoder")).model
    (tmp_path / "org").mkdir()
    save_folder(tmp_path / "org" / "kronecker-minilm-7.7x", encoder, bert_tokenizer(teacher))
    quick = [
        ("--minutes 30", "--steps 12 --ratio 3"),
        ("--batch 8", "--batch 8 --rounds 2"),
        ("ratio=7.7, minutes=30", "ratio=3, steps=12"),
    ]
    done = []
    for code, command in re.findall(
        r"^```python\n((?:.*\n)*?)```$|^ {4}(kronecker-transformers .*)$", README, re.MULTILINE
    ):
        for shown, short in quick:
            code, command = code.replace(shown, short), command.replace(shown, short)
        assert not re.search(r"minutes[ =]", code + command), "it would train for minutes"
        if "--format onnx" in command and not CAN_EXPORT:
            done.append(command)
            continue
        if code:
            exec(compile(code, "README.md", "exec"), {})
        else:
            assert main(shlex.split(command, comments=True)[1:]) == 0, command
        done.append(code or command)
    assert len(done) == README.count("```python") + len(COMMAND.findall(README)) >= 8
    assert "model.safetensors" in hub.repo("org/name").files()


def test_citation_and_workflow_are_yaml():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert len(citation["references"]) == 2
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
    chosen = [row["constraints"] for row in workflow["jobs"]["test"]["strategy"]["matrix"]["include"]]
    assert all((ROOT / name).exists() for name in chosen if name)
