"""What travels with a checkpoint does no more than it says, and what comes from elsewhere is refused or harmless."""

import ast
import json
import os
import pickle
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import BERT_SIZES, GPT2_SIZES, bert_tokenizer, inputs, teacher
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification, pipeline

import kronecker_transformers as kt
from kronecker_transformers import KroneckerBertConfig, KroneckerGPT2Config, compress
from kronecker_transformers.checkpoint.load import load_student, save_folder
from kronecker_transformers.hub.files import published_files

HARMLESS = {
    "collections", "contextlib", "dataclasses", "difflib", "fnmatch", "functools", "inspect", "math", "re",
    "sys", "torch", "transformers", "types", "typing", "__future__",
}  # fmt: skip
"""Nothing in these, as the code that travels uses them, opens a file or a connection."""
HUB_SET = sorted((Path(kt.__file__).parent / "models").glob("*.py"))
REFUSED = (ValueError, TypeError, OSError)


@pytest.fixture
def folder(tmp_path):
    result = compress(teacher(BertForSequenceClassification), "7.7x")
    return save_folder(tmp_path / "model", result.model, bert_tokenizer(tmp_path), result.report.to_dict())


def change_config(folder, name="config.json", /, **changes):
    config = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize("path", [path for path in HUB_SET if path.name != "__init__.py"], ids=lambda path: path.name)
def test_the_code_that_travels_imports_nothing_else(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                assert (path.parent / f"{node.module}.py").is_file()
                continue
            names = [node.module]
        else:
            continue
        for name in names:
            assert name.partition(".")[0] in HARMLESS


# Records what code in the folder of remote modules makes Python do, while a model loads, runs, trains and is saved.
WATCHED = """
    import os, sys, torch
    found, mark = [], "transformers_modules"
    standard, of_torch = (os.path.dirname(module.__file__) + os.sep for module in (os, torch))
    actions = ("open", "socket.", "subprocess.", "os.", "shutil.", "ctypes.", "exec", "compile", "pickle.")

    def is_library(path):
        return path.startswith(of_torch) or (path.startswith(standard) and "-packages" not in path)

    def hook(event, arguments):
        if event.startswith(actions):
            frame = sys._getframe(1)
            while frame and event not in ("exec", "compile") and is_library(frame.f_code.co_filename):
                frame = frame.f_back  # what the standard library and torch do for somebody else, but dataclasses
            if frame and mark in frame.f_code.co_filename:
                found.append((event, frame.f_code.co_filename.rpartition("/")[2], frame.f_code.co_name))

    sys.modules["kronecker_transformers"] = None
    import torch
    from transformers import AutoModelForSequenceClassification
    sys.addaudithook(hook)
    model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True)
    assert mark in sys.modules[type(model).__module__].__file__
    model(**torch.load(sys.argv[2], weights_only=True)).logits.sum().backward()
    model.resize_token_embeddings(90)
    model.save_pretrained(sys.argv[1] + "-again")
    assert not found, found
"""


def test_the_code_that_travels_opens_nothing(folder, tmp_path):
    batch = tmp_path / "batch.pt"
    torch.save(inputs(AutoModelForSequenceClassification.from_pretrained(folder)), batch)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(WATCHED), folder, batch], cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_with_the_package_no_file_of_the_checkpoint_runs(folder):
    for path in folder.glob("*.py"):
        path.write_text("raise SystemExit('remote code ran')")
    model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
    assert type(model) is kt.KroneckerBertForSequenceClassification
    assert not [name for name in sys.modules if name.startswith("transformers_modules") and "model" in name.split(".")]


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "optimizer.pt", "training_args.bin", "model.pth"])
def test_pickles_beside_the_weights_are_not_opened(folder, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder / name).write_bytes(pickle.dumps(Bomb()))
    AutoModelForSequenceClassification.from_pretrained(folder)
    load_student(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"holds no model\.safetensors, but"):
        load_student(folder)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "header",
    [
        (2**62).to_bytes(8, "little") + b"{}",
        (100_000_000).to_bytes(8, "little") + b"{" * 1000,
        (60).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[99999999999],"data_offsets":[0,4]}}'[:60],
        b"",
    ],
    ids=["length", "nested", "shape", "empty"],
)
def test_header_bombs(folder, header):
    (folder / "model.safetensors").write_bytes(header)
    with bounded(), pytest.raises(OSError, match=r"truncated or corrupted|cannot be loaded"):
        load_student(folder)


class bounded:  # noqa: N801 - reads as a block
    """The block may take seconds of this process and some memory, not minutes and gigabytes."""

    def __enter__(self):
        self.start, self.before = time.process_time(), psutil.Process().memory_info().rss

    def __exit__(self, *_):
        assert time.process_time() - self.start < 60
        assert psutil.Process().memory_info().rss - self.before < 500e6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 2**40}, r"hidden_size=1099511627776 in the config must be from 1 to 16,777,216"),
        ({"vocab_size": 10**12}, r"vocab_size=1000000000000 in the config must be from 1"),
        ({"num_hidden_layers": 10**9}, r"num_hidden_layers=1000000000 in the config must be from 0 to 1,000"),
        ({"hidden_size": -32}, r"hidden_size=-32 in the config must be from 1"),
        ({"hidden_size": 2**22, "num_attention_heads": 4}, "config asks for .* parameters, more than 100,000,000,000"),
        ({"factor_plan": {"*" * 5000: {"m1": 1, "n1": 1}}}, "has 5,000 characters; write at most 200"),
        ({"factor_plan": {f"pooler.{i}": {"m1": 1, "n1": 1} for i in range(99)}}, "has 99 entries for 22 modules"),
        ({"factor_plan": {"pooler.dense": {"m1": 2**80, "n1": 1}}}, "m1=1208925819614629174706176 must divide m=32"),
        ({"factor_plan": {"pooler.dense": {"m1": 8, "n1": 8, "terms": 10**30}}}, "terms=10+ must be <= 16"),
        ({"max_position_embeddings": 2**22}, "the weights lack .* of the .* values that the config asks for"),
        ({"intermediate_size": 2**22, "factor_plan": {}}, "the weights lack .* of the .* values"),
    ],
)
def test_absurd_configs_are_refused_before_anything_is_allocated(folder, changes, message):
    change_config(folder, **changes)
    with bounded(), pytest.raises(REFUSED, match=message):
        load_student(folder)


@pytest.mark.parametrize("reference", ["../../evil.Model", "/etc/evil.Model", "a.b.c", "x" * 10_000])
def test_a_malicious_auto_map_does_nothing_with_the_package(folder, reference, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    change_config(folder, auto_map=dict.fromkeys(config["auto_map"], reference))
    model = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
    assert type(model) is kt.KroneckerBertForSequenceClassification
    model.save_pretrained(tmp_path / "again")  # and it is not handed on
    assert json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"] == config["auto_map"]


def evil_repository(tmp_path):
    """Code that leaves a mark when it is imported."""
    repository, mark = tmp_path / "evil", tmp_path / "mark"
    repository.mkdir()
    (repository / "code.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    return f"{repository}--code.Evil", mark


def test_code_that_a_teachers_tokenizer_or_config_names_is_not_handed_on(tmp_path):
    reference, mark = evil_repository(tmp_path)
    source = tmp_path / "teacher"
    teacher(BertForSequenceClassification).save_pretrained(source)
    bert_tokenizer(source).save_pretrained(source)
    change_config(source, custom_pipelines={"text-classification": {"impl": reference, "pt": ["AutoModel"]}})
    change_config(source, "tokenizer_config.json", auto_map={"AutoTokenizer": [reference, None]})
    own = AutoTokenizer.from_pretrained(source)
    assert "auto_map" in own.init_kwargs
    folders = [compress(source, "7.7x").save_pretrained(tmp_path / "student")]
    folders.append(save_folder(tmp_path / "by hand", compress(source, "7.7x").model, own))
    for folder in folders:
        assert "custom_pipelines" not in json.loads((folder / "config.json").read_text())
        assert "auto_map" not in json.loads((folder / "tokenizer_config.json").read_text())
        assert AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("the fox").input_ids
        classify = pipeline("text-classification", str(folder), trust_remote_code=True)
        assert "label" in classify("the quick brown fox")[0]
    assert "auto_map" in own.init_kwargs
    assert not mark.exists()


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("config.json", "custom_pipelines", {"text-classification": {"impl": "org/evil--code.Evil"}}),
        ("tokenizer_config.json", "auto_map", {"AutoTokenizer": ["org/evil--code.Evil", None]}),
    ],
)
def test_code_of_others_is_not_published(folder, name, key, value):
    published_files(folder)
    change_config(folder, name, **{key: value})
    with pytest.raises(ValueError, match=f"{name} in .* has {key}=.*org/evil--code.Evil.* code that is not this model"):
        published_files(folder)


def test_a_teacher_of_an_unknown_family_is_refused_without_a_question(tmp_path, monkeypatch):
    reference, mark = evil_repository(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    source = tmp_path / "teacher"
    source.mkdir()
    (source / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": reference}}))
    with pytest.raises(ValueError, match="is of the family 'evil'; supported are bert"):
        compress(source, "7.7x")
    assert not mark.exists()


SCALARS = st.one_of(
    st.integers(-(2**70), 2**70), st.integers(-2, 100), st.floats(), st.booleans(), st.none(), st.text(max_size=8),
    st.lists(st.integers(-3, 99), max_size=4),
)  # fmt: skip
ENTRIES = st.one_of(
    SCALARS,
    st.fixed_dictionaries({}, optional={"m1": SCALARS, "n1": SCALARS, "terms": SCALARS, "x": SCALARS}),
)
NAMES = st.one_of(
    st.sampled_from(["*", "pooler.dense", "encoder.layer.*", "wte", "h.*.attn.*", "embeddings.*", "[", "?" * 150]),
    st.text(max_size=20),
)
PLANS = st.one_of(SCALARS, st.dictionaries(NAMES, ENTRIES, max_size=4))


def outcome(config_class, settings):
    """The refusal of a config, or None if it and, on the meta device, its model could be made."""
    model_class = kt.KroneckerBertModel if config_class is KroneckerBertConfig else kt.KroneckerGPT2Model
    try:
        with torch.device("meta"):
            model_class(config_class(**settings))
    except Exception as error:
        return error
    return None


def fuzz(config_class, settings):
    start = time.process_time()
    error = outcome(config_class, settings)
    assert time.process_time() - start < 30
    if error is not None:  # the other one is what transformers makes of a value of the wrong type
        assert isinstance(error, REFUSED) or type(error).__name__.startswith("StrictDataclass"), repr(error)
        assert str(error)


FAMILIES = st.sampled_from([(KroneckerBertConfig, BERT_SIZES), (KroneckerGPT2Config, GPT2_SIZES)])
CHANGES = st.dictionaries(st.sampled_from(sorted({**BERT_SIZES, **GPT2_SIZES})), SCALARS, max_size=2)


@settings(max_examples=200)
@given(FAMILIES, CHANGES, PLANS)
def test_fuzzed_configs(family, changes, plan):
    fuzz(family[0], {**family[1], **changes, "factor_plan": plan})


@pytest.mark.slow
@settings(max_examples=10_000)
@given(FAMILIES, CHANGES, PLANS)
def test_ten_thousand_fuzzed_configs(family, changes, plan):
    fuzz(family[0], {**family[1], **changes, "factor_plan": plan})
