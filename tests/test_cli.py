import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from students import factored_modules
from tiny import bert_tokenizer, gpt2_tokenizer, inputs, teacher
from transformers import AutoTokenizer, BertForSequenceClassification, BertModel, GPT2LMHeadModel

import kronecker_transformers as kt
from kronecker_transformers import commands, compress
from kronecker_transformers.checkpoint.files import new_folder
from kronecker_transformers.cli import main
from kronecker_transformers.compression.latency import Runtime


@pytest.fixture
def bert(tmp_path):
    teacher(BertForSequenceClassification).save_pretrained(tmp_path / "bert")
    bert_tokenizer(tmp_path).save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.fixture
def gpt2(tmp_path):
    model = teacher(GPT2LMHeadModel)
    model.generation_config.max_new_tokens = 9
    model.save_pretrained(tmp_path / "gpt2")
    gpt2_tokenizer(tmp_path).save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def kronecker(*arguments):
    return main([str(argument) for argument in arguments])


def test_compress_inspect_expand(bert, tmp_path, capsys):
    assert kronecker("compress", bert, "--plan", "7.7x", "--output", tmp_path / "student") == 0
    shown = capsys.readouterr()
    assert "encoder.layer.2.output.dense" in shown.out
    assert "Compression alone" in shown.out
    assert "factoring" in shown.err  # the progress bar
    assert AutoTokenizer.from_pretrained(tmp_path / "student")("the fox").input_ids
    student = kt.KroneckerBertForSequenceClassification.from_pretrained(tmp_path / "student")
    assert student.config.id2label == {0: "negative", 1: "neutral", 2: "positive"}

    assert kronecker("inspect", tmp_path / "student") == 0
    inspected = capsys.readouterr().out
    # the same tables, errors included, come from the folder alone
    assert inspected.rstrip() == shown.out[: shown.out.index("Saved in")].rstrip()

    assert kronecker("expand", tmp_path / "student", "--output", tmp_path / "alias") == 0
    assert kronecker("export", tmp_path / "student", "--format", "dense", "--output", tmp_path / "dense") == 0
    assert {path.name for path in (tmp_path / "alias").iterdir()} == {p.name for p in (tmp_path / "dense").iterdir()}
    assert not list((tmp_path / "dense").glob("*.py"))
    dense = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense")
    assert type(dense) is BertForSequenceClassification
    batch = inputs(student)
    torch.testing.assert_close(dense(**batch).logits, student(**batch).logits, rtol=1e-4, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "dense")("the fox").input_ids


def test_gpt2_keeps_tokenizer_and_generation_settings(gpt2, tmp_path):
    assert kronecker("compress", gpt2, "--plan", "kngpt2", "--output", tmp_path / "student") == 0
    student = kt.KroneckerGPT2LMHeadModel.from_pretrained(tmp_path / "student")
    assert student.generation_config.max_new_tokens == 9
    text = "the quick brown fox"
    assert AutoTokenizer.from_pretrained(tmp_path / "student")(text) == AutoTokenizer.from_pretrained(gpt2)(text)


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json"])
def test_plan_files(bert, tmp_path, suffix):
    plan = {"encoder.layer.*.attention.self.*": {"m1": 16, "n1": 8, "terms": 2}, "embeddings.word_embeddings": [64, 8]}
    file = tmp_path / f"plan{suffix}"
    file.write_text(json.dumps(plan))  # JSON is YAML too
    assert kronecker("compress", bert, "--plan", file, "--output", tmp_path / "student") == 0
    config = transformers.AutoConfig.from_pretrained(tmp_path / "student")
    assert factored_modules(config)["encoder.layer.1.attention.self.key"] == kt.FactorEntry(16, 8, 2)
    assert len(factored_modules(config)) == 10


def test_plan_files_may_share_entries(bert, tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text("pooler.dense: &half {m1: 16, n1: 16}\nencoder.layer.0.attention.*: {<<: *half, terms: 2}\n")
    assert kronecker("compress", bert, "--plan", file, "--output", tmp_path / "student") == 0
    config = transformers.AutoConfig.from_pretrained(tmp_path / "student")
    assert factored_modules(config)["encoder.layer.0.attention.self.key"] == kt.FactorEntry(16, 16, 2)


def test_inspect_shows_no_errors_once_the_weights_have_changed(bert, tmp_path, capsys):
    kronecker("compress", bert, "--output", tmp_path / "student")
    weights = tmp_path / "student" / "model.safetensors"
    tensors = load_file(weights)
    tensors["bert.embeddings.word_embeddings.A"] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    capsys.readouterr()
    assert kronecker("inspect", tmp_path / "student") == 0
    assert "No approximation errors to show" in capsys.readouterr().out


def test_empty_output_folder_keeps_its_mode_and_links_are_followed(bert, tmp_path):
    (tmp_path / "student").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("student")
    assert kronecker("compress", bert, "--output", tmp_path / "link") == 0
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "student").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "student" / "config.json").is_file()


def test_new_folder_and_its_files_have_the_usual_mode(bert, tmp_path):
    (tmp_path / "usual").mkdir()
    (tmp_path / "usual" / "file").touch()
    kronecker("compress", bert, "--output", tmp_path / "student")
    assert (tmp_path / "student").stat().st_mode == (tmp_path / "usual").stat().st_mode
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "student").iterdir()}
    assert "model.safetensors" in modes
    assert set(modes.values()) == {(tmp_path / "usual" / "file").stat().st_mode}


class TestBadInput:
    def fails(self, capsys, tmp_path, *arguments):
        before = sorted(tmp_path.rglob("*"))
        assert kronecker(*arguments) == 1
        assert sorted(tmp_path.rglob("*")) == before  # nothing half-written
        shown = capsys.readouterr()
        message = shown.err.strip().splitlines()[-1]
        assert message.startswith(f"kronecker-transformers {arguments[0]}: error: ")
        assert "Traceback" not in shown.err
        return message

    @pytest.mark.parametrize(
        ("plan", "expected"),
        [
            ("9x", "plan='9x' is neither one of 7.7x, 21x, kngpt2, search, low-rank nor a file"),
            ("kngpt2", "plan='kngpt2' is not a preset for bert; choose '7.7x' or '21x'"),
            ({"pooler.dense": [5, 4]}, "module 'pooler.dense' with weight (32, 32): m1=5 must divide m=32"),
            ({"pooler.dense": [8, 4, 0]}, "terms=0 in a factor plan must be >= 1"),
            ({"pooler.dense": [8, 4, -1]}, "terms=-1 in a factor plan must be >= 1"),
            ({"layer.*": [8, 4]}, "plan pattern 'layer.*' matches no module"),
            ({"pooler.*": [8, 4], "*.dense": [8, 4]}, "both match module 'pooler.dense'"),
            ("just a text", "must map patterns to entries, got str"),
            ("{broken: [", "plan file"),
            (
                "*.dense: [16, 16]",
                "line 1: expected alphabetic or numeric character, but found '.'; a pattern that begins",
            ),
            ("# nothing \n", "it is empty; write one line for each pattern"),
            (
                {"encoder.layer.*.intermidiate.dense": [8, 2]},
                "for example encoder.layer.2.intermediate.dense, encoder.layer",
            ),
            ("pooler.dense: [16, 16]\npooler.dense: [8, 8]\n", "'pooler.dense' stands there twice"),
        ],
        ids=str,
    )
    def test_plans(self, bert, tmp_path, capsys, plan, expected):
        if not isinstance(plan, str) or " " in plan:
            file = tmp_path / "plan.yaml"
            file.write_text(plan if isinstance(plan, str) else json.dumps(plan))
            plan = file
        message = self.fails(capsys, tmp_path, "compress", bert, "--plan", plan, "--output", tmp_path / "student")
        assert expected in message

    @pytest.mark.parametrize("option", [("--calibration-texts", 0), ("--calibration-column", "body")])
    def test_options_of_a_text_that_is_not_there(self, bert, tmp_path, capsys, option):
        message = self.fails(capsys, tmp_path, "compress", bert, *option, "--output", tmp_path / "student")
        assert f"{option[0]} is of a calibration text; give --calibration, or leave {option[0]} out" in message

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [({"hidden_size": "32"}, "cannot be used"), ({"hidden_size": 32.5}, "cannot be used"),
         ({"id2label": 3}, "cannot be used"), ({"dtype": "zzz"}, "cannot be"), ({"pad_token_id": "a"}, "cannot be")],
    )  # fmt: skip
    def test_values_of_a_wrong_type(self, bert, tmp_path, capsys, changes, expected):
        config = json.loads((bert / "config.json").read_text())
        (bert / "config.json").write_text(json.dumps({**config, **changes}))
        message = self.fails(capsys, tmp_path, "compress", bert, "--output", tmp_path / "student")
        assert expected in message
        assert str(bert) in message

    def test_missing_teacher(self, tmp_path, capsys):
        message = self.fails(capsys, tmp_path, "compress", tmp_path / "nowhere", "--output", tmp_path / "student")
        assert "nowhere' does not exist; give an existing folder or a model name of the Hub" in message

    def test_paths_that_are_no_model_folder(self, bert, tmp_path, capsys):
        message = self.fails(capsys, tmp_path, "compress", bert / "config.json", "--output", tmp_path / "student")
        assert "config.json' is a file; give the folder" in message
        (tmp_path / "empty").mkdir()
        assert "empty' holds no config.json" in self.fails(capsys, tmp_path, "inspect", tmp_path / "empty")

    def test_hub_name_without_network(self, tmp_path, capsys):
        message = self.fails(capsys, tmp_path, "compress", "some-org/some-model", "--output", tmp_path / "student")
        assert (
            "'some-org/some-model' is neither a folder with a model nor a model on the Hub that can be reached"
            in message
        )

    def test_other_family(self, tmp_path, capsys):
        config = transformers.CamembertConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1, vocab_size=50)
        transformers.CamembertModel(config).save_pretrained(tmp_path / "camembert")
        message = self.fails(capsys, tmp_path, "compress", tmp_path / "camembert", "--output", tmp_path / "student")
        assert "is of the family 'camembert'; supported are bert, distilbert, electra" in message

    def test_other_head(self, tmp_path, capsys):
        transformers.BertForNextSentencePrediction(teacher(BertForSequenceClassification).config).save_pretrained(
            tmp_path / "nsp"
        )
        message = self.fails(capsys, tmp_path, "compress", tmp_path / "nsp", "--output", tmp_path / "student")
        assert "architecture 'BertForNextSentencePrediction'; supported: BertForMaskedLM" in message

    @pytest.mark.parametrize("kept", [0, 5, 2000])
    def test_truncated_teacher(self, bert, tmp_path, capsys, kept):
        weights = bert / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:kept])
        message = self.fails(capsys, tmp_path, "compress", bert, "--output", tmp_path / "student")
        assert "truncated or corrupted" in message

    def test_truncated_student(self, bert, tmp_path, capsys):
        kronecker("compress", bert, "--output", tmp_path / "student")
        weights = tmp_path / "student" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-7])
        for command in (
            ["inspect", tmp_path / "student"],
            ["expand", tmp_path / "student", "--output", tmp_path / "d"],
        ):
            assert "truncated or corrupted" in self.fails(capsys, tmp_path, *command)

    def test_teacher_that_is_not_finite(self, bert, tmp_path, capsys):
        tensors = load_file(bert / "model.safetensors")
        tensors["bert.pooler.dense.weight"][2, 3] = float("nan")
        save_file(tensors, bert / "model.safetensors", metadata={"format": "pt"})
        message = self.fails(capsys, tmp_path, "compress", bert, "--output", tmp_path / "student")
        assert (
            "parameter 'bert.pooler.dense.weight' of the BertForSequenceClassification holds NaN or infinite values"
            in message
        )

    def test_output_that_holds_something(self, bert, tmp_path, capsys):
        (tmp_path / "student").mkdir()
        (tmp_path / "student" / "thesis.txt").write_text("precious")
        message = self.fails(capsys, tmp_path, "compress", bert, "--output", tmp_path / "student")
        assert "already holds something; choose another folder" in message
        file = tmp_path / "file"
        file.write_text("precious")
        assert "already holds something" in self.fails(capsys, tmp_path, "compress", bert, "--output", file)

    def test_output_that_cannot_be_written(self, bert, tmp_path, capsys):
        message = self.fails(capsys, tmp_path, "compress", bert, "--output", "/proc/nowhere/student")
        assert "output '/proc/nowhere/student' could not be written" in message
        (tmp_path / "file").write_text("precious")
        message = self.fails(capsys, tmp_path, "compress", bert, "--output", tmp_path / "file" / "student")
        assert "could not be written" in message

    @pytest.mark.parametrize(
        "limit", [*(pytest.param(limit, marks=pytest.mark.slow) for limit in (2_500, 5_000)), 20_000]
    )
    def test_full_disk(self, bert, tmp_path, limit):
        # no file may grow beyond the limit: writing stops in the middle of a file, as on a full disk
        process = subprocess.run(
            [sys.executable, "-m", "kronecker_transformers.cli", "compress", bert, "--output", tmp_path / "student"],
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
            capture_output=True, text=True, check=False,
            env={"HF_HUB_OFFLINE": "1", "HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip
        assert process.returncode == 1
        message = process.stderr.strip().splitlines()[-1]
        assert "student' could not be written and nothing was left behind" in message
        assert "free some space or choose another folder" in message
        assert not [path for path in tmp_path.iterdir() if "student" in path.name]

    @pytest.mark.parametrize("error", [ValueError, KeyError, RuntimeError, ImportError])
    def test_what_is_no_fault_of_the_disk_is_not_called_one(self, tmp_path, error):
        with pytest.raises(error, match="plan and layers disagree"), new_folder(tmp_path / "a" / "b"):
            raise error("plan and layers disagree")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("picture", "message"),
        [("plan.foo", "must not end in 'foo'; give it one of"), ("missing/plan.png", "folder .* does not exist")],
    )
    def test_pictures_that_cannot_be_drawn(self, bert, tmp_path, capsys, monkeypatch, picture, message):
        for name in ("search_plan", "benchmark"):
            monkeypatch.setattr(commands, name, lambda *a, **k: pytest.fail("work began"))
        given = ("--picture", tmp_path / picture)
        text = tmp_path / "text.txt"
        text.write_text("the fox\n" * 30)
        search = ("search", bert, "--ratio", 2, "--calibration", text, "--output", tmp_path / "plan.yaml")
        for command in (search, ("benchmark", bert, "--against", bert)):
            assert kronecker(*command, *given) == 1
            assert re.search(message, capsys.readouterr().err)
        monkeypatch.setattr("kronecker_transformers.display.has_pictures", lambda: False)
        assert kronecker(*search, "--picture", tmp_path / "plan.png") == 1
        assert "pip install matplotlib" in capsys.readouterr().err

    def test_full_disk_while_the_tokenizer_is_written(self, tmp_path):
        teacher(BertForSequenceClassification, vocab_size=5000).save_pretrained(tmp_path / "big")
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{i}" for i in range(4995))]
        (tmp_path / "vocab.txt").write_text("\n".join(words))
        transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "big")
        (tmp_path / "plan.json").write_text('{"embeddings.word_embeddings": [50, 2]}')
        limit = (tmp_path / "big" / "tokenizer.json").stat().st_size // 2
        process = subprocess.run(
            [sys.executable, "-m", "kronecker_transformers.cli", "compress", tmp_path / "big",
             "--plan", tmp_path / "plan.json", "--output", tmp_path / "deep" / "er" / "student"],
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
            capture_output=True, text=True, check=False,
            env={"HF_HUB_OFFLINE": "1", "HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip
        assert process.returncode == 1
        assert "could not be written and nothing was left behind" in process.stderr.strip().splitlines()[-1]
        assert not (tmp_path / "deep").exists()

    def test_checkpoints_that_lack_weights(self, bert, gpt2, tmp_path, capsys):
        kronecker("compress", gpt2, "--plan", "kngpt2", "--output", tmp_path / "student")
        for folder, prefix in ((bert, "bert.encoder.layer.2."), (tmp_path / "student", "transformer.h.0.mlp.")):
            tensors = load_file(folder / "model.safetensors")
            kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
            save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        for command in (["compress", bert, "--output", tmp_path / "new"], ["inspect", tmp_path / "student"]):
            message = self.fails(capsys, tmp_path, *command)
            assert "parameters, '" in message
            assert "first; restore them" in message

    def test_damaged_teachers(self, bert, tmp_path, capsys):
        config = json.loads((bert / "config.json").read_text())
        for file, content, expected in (
            ("config.json", json.dumps({**config, "intermediate_size": 48}), "cannot be loaded"),
            ("config.json", "{", "is not JSON"),
            ("tokenizer.json", "{", "the tokenizer in"),
        ):
            original = (bert / file).read_text()
            (bert / file).write_text(content)
            message = self.fails(capsys, tmp_path, "compress", bert, "--output", tmp_path / "student")
            assert expected in message
            assert str(bert) in message
            (bert / file).write_text(original)
        (bert / "model.safetensors").unlink()
        message = self.fails(capsys, tmp_path, "compress", bert, "--output", tmp_path / "student")
        assert f"folder '{bert}' holds no model.safetensors, but no weights at all; save the model" in message

    @pytest.mark.parametrize("record", ["{}", "[]", "{", '{"factors_sha256": 3}'])
    def test_damaged_record(self, bert, tmp_path, capsys, record):
        kronecker("compress", bert, "--output", tmp_path / "student")
        (tmp_path / "student" / "compression.json").write_text(record)
        assert kronecker("inspect", tmp_path / "student") == 0
        assert "No approximation errors to show" in capsys.readouterr().out

    def test_a_class_that_is_no_list(self, bert, tmp_path):
        kronecker("compress", bert, "--output", tmp_path / "student")
        file = tmp_path / "student" / "config.json"
        config = json.loads(file.read_text())
        file.write_text(json.dumps({**config, "architectures": config["architectures"][0]}))
        assert kronecker("inspect", file.parent) == 0

    def test_student_with_a_class_that_is_no_model(self, bert, tmp_path, capsys):
        kronecker("compress", bert, "--output", tmp_path / "student")
        file = tmp_path / "student" / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "architectures": ["KroneckerLinear"]}))
        assert "of class KroneckerLinear, not a factored one" in self.fails(capsys, tmp_path, "inspect", file.parent)

    def test_current_folder(self, bert, tmp_path, capsys, monkeypatch):
        (tmp_path / "empty").mkdir()
        monkeypatch.chdir(tmp_path / "empty")
        assert "is the current folder" in self.fails(capsys, tmp_path, "compress", bert, "--output", ".")

    def test_not_a_factored_model(self, bert, tmp_path, capsys):
        message = self.fails(capsys, tmp_path, "inspect", bert)
        assert "holds a 'bert' model of class BertForSequenceClassification, not a factored one" in message


def test_help_and_version(capsys):
    for arguments in (["--help"], ["compress", "--help"], ["inspect", "--help"], ["expand", "--help"], ["--version"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 0
    assert kt.__version__ in capsys.readouterr().out


def test_installed_command():
    command = Path(sys.executable).parent / "kronecker-transformers"
    assert "compress" in subprocess.run([command, "--help"], capture_output=True, text=True, check=True).stdout


class ReachedError(Exception):
    """In place of long work."""


OPTIONS = [
    (
        "kronecker_transformers.experiments.distill.distill",
        ["distill", "TEACHER", "--text", "a.txt", "--output", "out", "--plan", "low-rank", "--learning-rate", "2e-4",
         "--seed", "7", "--text-column", "body", "--no-bf16", "--layers", "3", "--steps", "9", "--ratio", "4"],
        {"plan": "low-rank", "learning_rate": 2e-4, "seed": 7, "column": "body", "bf16": False, "layers": 3, "steps": 9,
         "ratio": 4.0, "minutes": None, "frequent_words": True, "task": None},
    ),
    (
        "kronecker_transformers.experiments.distill.distill",
        ["distill", "TEACHER", "--task", "rte", "--data", "glue", "--output", "out", "--minutes", "1.5", "--bf16",
         "--layers", "1,4", "--no-frequent-words"],
        {"task": "rte", "data_dir": "glue", "minutes": 1.5, "bf16": True, "layers": [1, 4], "frequent_words": False,
         "plan": None, "seed": 0},
    ),
    (
        "kronecker_transformers.commands.search_plan",
        ["search", "TEACHER", "--calibration", "TEXT", "--output", "plan.yaml", "--parameters", "5000", "--size-bytes",
         "9000", "--flops", "7e6", "--low-rank", "--milliseconds", "4", "--batch", "2", "--length", "16"],
        {"parameters": 5000, "size_bytes": 9000, "flops": 7e6, "low_rank": True, "milliseconds": 4.0,
         "runtime": Runtime(2, 16), "ratio": None},
    ),
    (
        "kronecker_transformers.commands.benchmark",
        ["benchmark", "A", "--against", "B", "--dtype", "bfloat16", "--device", "cuda", "--batch", "3",
         "--length", "64"],
        {"dtype": "bfloat16", "device": "cuda", "batch": 3, "length": 64, "compiled": False},
    ),
    (
        "kronecker_transformers.export.onnx.export_graphs",
        ["export", "TEACHER", "--format", "onnx", "--fp16", "--int4", "--output", "out"],
        {3: ["fp32", "int4", "fp16"]},
    ),
    (
        "kronecker_transformers.commands.push",
        ["push", "STUDENT", "org/name", "--base-model", "org/own", "--revision", "trial", "--private"],
        {"revision": "trial", "private": True, "create_pr": False},
    ),
    (
        "kronecker_transformers.commands.push",
        ["push", "STUDENT", "org/name", "--create-pr"],
        {"revision": None, "private": None, "create_pr": True},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("function", "arguments", "wanted"), OPTIONS, ids=[" ".join(a) for _, a, _ in OPTIONS])
def test_options_reach_the_package(function, arguments, wanted, tmp_path, monkeypatch):
    given = {}

    def reached(*positional, **named):
        given.update(enumerate(positional))
        given.update(named)
        raise ReachedError

    source = tmp_path / "teacher"
    teacher(BertModel).save_pretrained(source)
    bert_tokenizer(source).save_pretrained(source)
    compress(source, "7.7x").save_pretrained(tmp_path / "student")
    (tmp_path / "text.txt").write_text("the quick brown fox\n" * 400)
    names = {"TEACHER": source, "STUDENT": tmp_path / "student", "TEXT": tmp_path / "text.txt"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(function, reached)
    monkeypatch.setattr("kronecker_transformers.commands.card_metadata", lambda name: {})
    with pytest.raises(ReachedError):
        main([str(names.get(argument, argument)) for argument in arguments])
    assert {key: given[key] for key in wanted} == wanted
    if "--base-model" in arguments:
        assert given["card"].data.base_model == "org/own"
