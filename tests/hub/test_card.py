"""Cards are made from what is recorded and counted, are valid for the Hub, and say what was not measured."""

import hashlib
import json
import re
from pathlib import Path
from urllib.parse import urlparse

import pytest
import torch
import transformers
from huggingface_hub import EvalResult, ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index
from safetensors import safe_open
from tiny import bert_tokenizer, perturb, teacher, tokenizer_for
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2LMHeadModel,
    RobertaForMaskedLM,
)
from transformers.pipelines import SUPPORTED_TASKS

from kronecker_transformers import compress
from kronecker_transformers.checkpoint.load import save_folder
from kronecker_transformers.evaluation.cost import describe
from kronecker_transformers.export.dense import to_dense
from kronecker_transformers.hub.card import folder_metadata, model_card
from kronecker_transformers.hub.files import without_local_paths
from kronecker_transformers.models import DENSE_CLASSES

RECORD = {
    "options": {"teacher": "google-bert/bert-tiny", "task_name": "mrpc",
                "command": ["python", "examples/run_glue_kd.py", "--teacher", "/home/ada/secret/bert", "--seed", "3"]},
    "models": ["teacher", "student, undistilled", "student"],
    "rows": {"parameters": [9, 8, 7], "accuracy": [0.91, 0.5, 0.87654], "f1": [0.9, None, 0.8]},
    "metrics": {"student": {"accuracy": 0.87654, "f1": 0.8}},
    "protocol": "dev set",
    "training": {"steps": 1200, "samples": 38400, "tokens": 1234567, "seconds": 600.0, "batch": 32,
                 "learning_rate": 1e-4, "optimizer": "Muon and AdamW",
                 "precision": "bfloat16", "objective": {"hidden_mse": 1.0}, "seed": 3},
    "environment": "CPU Babbage, 2 threads",
}  # fmt: skip
BENCHMARK = {
    "model": {"milliseconds": 20.04, "name": "/x/student"}, "against": {"milliseconds": 50.0, "name": "/x/bert"},
    "batch": 1, "length": 128, "dtype": "float32", "device": "cpu", "speedup": 2.495, "environment": "CPU Babbage",
}  # fmt: skip


def student_folder(dense_class, tmp_path):
    dense = teacher(dense_class)
    result = compress(dense, "kngpt2" if dense.config.model_type == "gpt2" else "7.7x")
    tokenizer = tokenizer_for(dense.config.model_type, tmp_path)
    return save_folder(tmp_path / "model", result.model, tokenizer, result.report.to_dict()), result.model


def benchmark_of(model):
    return {**BENCHMARK, "model": {**BENCHMARK["model"], "parameters": model.num_parameters()}}


def write(folder, name, content):
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize("dense_class", DENSE_CLASSES.values(), ids=lambda dense_class: dense_class.__name__)
def test_every_class_and_its_twin(dense_class, tmp_path):
    folder, model = student_folder(dense_class, tmp_path)
    twin = save_folder(tmp_path / "twin", to_dense(model))
    for place, twin_of in ((folder, None), (twin, "org/tiny")):
        card = model_card(place, "org/tiny-new", twin_of=twin_of)
        again = ModelCard(str(card))  # as the Hub reads it
        assert again.data.to_dict() == card.data.to_dict()
        assert card.data.library_name == "transformers"
        tag = card.data.pipeline_tag
        assert tag in SUPPORTED_TASKS or tag in ("question-answering", "multiple-choice")
        assert card.data.widget[0]["text"]
        auto_class = re.search(r"import (AutoModel\w*)", card.text)[1]
        loaded = getattr(transformers, auto_class).from_pretrained(place)
        assert type(loaded).__name__ == type(model).__name__.removeprefix("" if twin_of is None else "Kronecker")
        assert ("trust_remote_code=True" in card.text) == (twin_of is None)
        for url in re.findall(r"\((https?://[^)]*)\)", card.text):
            assert urlparse(url).netloc == "huggingface.co"
            assert re.fullmatch(r"/[\w.-]+/[\w.-]+", urlparse(url).path)


def test_the_example_has_the_mask_of_the_tokenizer(tmp_path):
    tokenizer = tokenizer_for("roberta", tmp_path)
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    model = compress(teacher(RobertaForMaskedLM), "7.7x").model
    card = model_card(save_folder(tmp_path / "model", model, tokenizer), "org/tiny")
    assert card.data.widget == [{"text": "Paris is the <mask> of France."}]


def test_a_twin_has_the_quality_of_the_factored_model_but_not_its_size_and_speed(tmp_path):
    folder, model = student_folder(BertForMaskedLM, tmp_path)
    rows = {**RECORD["rows"], "megabytes": [40.0, 13.25, 13.25], "examples per second": [10.0, 40.0, 40.0]}
    write(folder, "results.json", {**RECORD, "rows": rows})
    twin = save_folder(tmp_path / "twin", to_dense(model))
    card = model_card(twin, "org/tiny-dense", twin_of="org/tiny", records=folder).text
    assert "| accuracy | 0.91 | 0.5 | 0.8765 |" in card
    assert "13.25" not in card
    assert "**Time**: not measured." in card
    assert "**Time**: examples per second are below." in model_card(folder, "org/tiny").text


def test_only_a_model_that_is_as_it_was_factored_is_called_untrained(tmp_path):
    """Somebody may have trained it without our trainer, which leaves no record."""
    folder, model = student_folder(BertForMaskedLM, tmp_path)
    assert "It has not been distilled, so its quality is poor" in model_card(folder, "org/tiny").text
    perturb(model).save_pretrained(folder)
    text = model_card(folder, "org/tiny").text
    assert "It has not been distilled" not in text
    assert "Only factored, not trained" not in text
    assert "- Training: not recorded" in text


def test_a_dense_folder_gets_no_card_of_a_factored_one(tmp_path):
    _, model = student_folder(BertForMaskedLM, tmp_path)
    twin = save_folder(tmp_path / "twin", to_dense(model))
    with pytest.raises(ValueError, match="holds a BertForMaskedLM, not a factored model; push the factored folder"):
        model_card(twin, "org/tiny")


def test_sizes_are_those_of_the_files(tmp_path):
    folder, _ = student_folder(BertForMaskedLM, tmp_path)
    with safe_open(folder / "model.safetensors", "pt") as file:
        parameters = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 - no mapping
    text = model_card(folder, "org/tiny").text
    dense = teacher(BertForMaskedLM).num_parameters()
    megabytes = [f"{4 * number / 1e6:,.1f}" for number in (dense, parameters)]
    assert f"| parameters | {dense:,} | {parameters:,} | {dense / parameters:.2f}x |" in text
    assert f"| megabytes of weights | {megabytes[0]} | {megabytes[1]} | {dense / parameters:.2f}x |" in text


def test_code_is_listed_with_the_hashes_of_the_files(tmp_path):
    folder, _ = student_folder(BertForMaskedLM, tmp_path)
    text = model_card(folder, "org/tiny").text
    files = sorted(folder.glob("*.py"))
    assert len(files) > 5
    for path in files:
        assert hashlib.sha256(path.read_bytes()).hexdigest() in next(
            line for line in text.splitlines() if f"`{path.name}`" in line
        )


def test_a_twin_that_was_not_distilled_says_so_too(tmp_path):
    folder, model = student_folder(BertForMaskedLM, tmp_path)
    twin = save_folder(tmp_path / "twin", to_dense(model))

    def of_twin():
        return model_card(twin, "org/tiny-dense", twin_of="org/tiny", records=folder).text

    assert "**It has not been distilled, so its quality is poor.** Distil the factored model before use." in of_twin()
    assert "Only factored, not trained" in of_twin()
    write(folder, "results.json", RECORD)
    assert "distilled, so its" not in of_twin()


def test_a_model_without_a_tokenizer_names_none(tmp_path):
    model = compress(teacher(BertModel), "7.7x").model
    card = model_card(save_folder(tmp_path / "model", model, None), "org/tiny")
    assert "from transformers import AutoModel\n" in card.text
    assert "AutoTokenizer" not in card.text


def test_a_time_of_another_model_is_refused(tmp_path):
    folder, model = student_folder(BertModel, tmp_path)
    write(folder, "benchmark.json", {**BENCHMARK, "model": {**BENCHMARK["model"], "parameters": 1234}})
    with pytest.raises(
        ValueError, match=f"is of a model of 1,234 parameters, and .* has {model.num_parameters():,}; run"
    ):
        model_card(folder, "org/tiny")


def test_mnli_has_a_score_for_each_of_its_validation_sets(tmp_path):
    folder, _ = student_folder(BertForSequenceClassification, tmp_path)
    scores = {"accuracy_matched": 0.75, "accuracy_mismatched": 0.5}
    options = {**RECORD["options"], "task_name": "mnli"}
    write(folder, "results.json", {**RECORD, "options": options, "metrics": {"student": scores}})
    data = model_card(folder, "org/tiny").data
    found = [(result.dataset_split, result.metric_type, result.metric_value) for result in data.eval_results]
    assert found == [("validation_matched", "accuracy", 0.75), ("validation_mismatched", "accuracy", 0.5)]
    assert data.metrics == ["accuracy"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("benchmark.json", {"latency_ms": 3}),
        ("results.json", {"rows": [1, 2]}),
        ("results.json", {"training": {"epochs": 3}}),
        ("results.json", {"rows": {"accuracy": 0.9}, "models": ["student"]}),
    ],
)
def test_a_file_of_the_same_name_that_holds_something_else_is_refused(name, content, tmp_path):
    folder, _ = student_folder(BertForSequenceClassification, tmp_path)
    write(folder, name, content)
    with pytest.raises(ValueError, match=f"{name}' is no record of this package .*; rename or remove it"):
        model_card(folder, "org/tiny")


def test_what_is_not_known_is_said(tmp_path):
    folder, _ = student_folder(BertForSequenceClassification, tmp_path)
    card = model_card(folder, "org/tiny")
    for line in ("**Time**: not measured.", "**Quality**: not measured.", "Teacher: not recorded",
                 "Data: not recorded", "Training: not recorded", "Machine and versions: not recorded",
                 "Command: not recorded", "It has not been distilled"):  # fmt: skip
        assert line in card.text
    for name in ("base_model", "license", "language", "model-index", "metrics", "datasets"):
        assert name not in card.data.to_dict()
    assert "None" not in str(card)


def test_what_is_known_is_taken_over(tmp_path):
    folder, model = student_folder(BertForSequenceClassification, tmp_path)
    write(folder, "results.json", RECORD)
    write(folder, "benchmark.json", benchmark_of(model))
    (folder / "training.png").write_bytes(b"")
    card = model_card(folder, "org/tiny", license="mit", language="en")
    for line in (
        "| accuracy | 0.91 | 0.5 | 0.8765 |",
        "| f1 | 0.9 | - | 0.8 |",
        "**Quality** (dev set):",
        "20.0 ms for 1 x 128 tokens in float32 on cpu, 2.50 times as fast as bert with 50.0 ms (CPU Babbage).",
        "Teacher: google-bert/bert-tiny",
        "Data: GLUE mrpc",
        "1,200 steps of 32 samples (38,400 samples, 1,234,567 tokens, 10.0 minutes), learning rate 0.0001 "
        "(Muon and AdamW), bfloat16, "
        "seed 3; objective: 1 hidden_mse",
        "Machine and versions: CPU Babbage, 2 threads",
        "`python examples/run_glue_kd.py --teacher bert --seed 3`",
        "![training](training.png)",
    ):
        assert line in card.text
    assert "not measured" not in card.text
    assert "not been distilled" not in card.text
    assert "/home" not in str(card)
    data = card.data.to_dict()
    assert data["base_model"] == "google-bert/bert-tiny"
    assert data["license"] == "mit"
    assert data["datasets"] == ["nyu-mll/glue"]
    assert data["metrics"] == ["accuracy", "f1"]
    where = {"task_type": "text-classification", "dataset_type": "nyu-mll/glue", "dataset_name": "GLUE mrpc",
             "dataset_config": "mrpc", "dataset_split": "validation"}  # fmt: skip
    wanted = [EvalResult(metric_type=name, metric_value=value, **where) for name, value in
              (("accuracy", 0.87654), ("f1", 0.8))]  # fmt: skip
    assert data["model-index"] == eval_results_to_model_index("tiny", wanted)


@pytest.mark.parametrize(
    ("options", "data", "datasets", "scored"),
    [
        ({"version": "v2.0"}, "SQuAD v2.0", ["rajpurkar/squad_v2"], True),
        ({"version": "v1.1", "max_eval_samples": 10, "max_train_samples": 2000}, "SQuAD v1.1, 2,000 examples of it",
         ["rajpurkar/squad"], False),
        ({"version": "v1.1", "train_file": "/x/mine.json"}, "mine.json", None, False),
        ({"version": "v1.1", "validation_file": "/x/mine.json"}, "not recorded", None, False),
        ({"train_text": ["/x/a.txt", "/x/b.txt"], "fraction": 0.1}, "a.txt, b.txt, 10% of it", None, False),
        ({"train_text": ["a.txt"], "fraction": 0.004}, "a.txt, 0.4% of it", None, False),
        ({"train_text": ["data/corpus.txt"]}, "corpus.txt", None, False),
        ({"train_text": ["wikimedia/wikipedia:20231101.en"]}, "wikimedia/wikipedia:20231101.en",
         ["wikimedia/wikipedia"], False),
        ({"train_text": ["Salesforce/wikitext"], "fraction": 1.0}, "Salesforce/wikitext", ["Salesforce/wikitext"],
         False),
    ],
)  # fmt: skip
def test_data(tmp_path, options, data, datasets, scored):
    folder, _ = student_folder(BertForSequenceClassification, tmp_path)
    write(folder, "results.json", {**RECORD, "options": options})
    card = model_card(folder, "org/tiny")
    assert f"- Data: {data}\n" in card.text
    assert card.data.to_dict().get("datasets") == datasets
    assert ("model-index" in card.data.to_dict()) == scored


def test_licence_and_language_come_from_the_teacher_in_a_folder(tmp_path):
    bert = tmp_path / "bert"
    teacher(GPT2LMHeadModel).save_pretrained(bert)
    (bert / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: fr\nbase_model: org/grand\n---\n# Bert\n")
    result = compress(bert, "kngpt2")
    result.save_pretrained(tmp_path / "student")
    data = model_card(tmp_path / "student", "org/tiny").data
    assert (data.license, data.language, data.base_model) == ("apache-2.0", "fr", "org/grand")
    assert str(tmp_path) not in str(model_card(tmp_path / "student", "org/tiny"))


@pytest.mark.parametrize("name", ["results.json", "benchmark.json"])
def test_unreadable_records(tmp_path, name):
    folder, _ = student_folder(BertForSequenceClassification, tmp_path)
    (folder / name).write_text("{")
    with pytest.raises(ValueError, match=f"{name}.* is not JSON .*; write it again or remove it"):
        model_card(folder, "org/tiny")


CARDS = ("kronecker-minilm-7.7x", "kronecker-mpnet-7.7x", "kronecker-mpnet-21x")


def test_all_shipped_cards_are_looked_at():
    assert {path.stem for path in (Path(__file__).parents[2] / "model_cards").glob("*.md")} - {"README"} == set(CARDS)


@pytest.mark.parametrize("name", CARDS)
def test_shipped_cards(name):
    path = Path(__file__).parents[2] / "model_cards" / f"{name}.md"
    card = ModelCard.load(path)
    assert card.data.model_name == path.stem
    assert (card.data.library_name, card.data.pipeline_tag) == ("sentence-transformers", "sentence-similarity")
    assert card.data.base_model.count("/") == 1
    assert card.data.license
    assert "**Time**" in card.text
    assert "**Quality**" in card.text
    record = json.loads((path.parent / "records" / f"{path.stem}.json").read_text())
    for name, values in record["rows"].items():
        if name != "parameters":
            shown = " | ".join("-" if value is None else f"{value:.4g}" for value in values)
            assert f"| {name} | {shown} |" in card.text
    assert f"{record['training']['steps']:,} steps of" in card.text


@pytest.mark.parametrize("dense_class", [BertForMaskedLM, GPT2LMHeadModel, BertForSequenceClassification])
@pytest.mark.parametrize("plan", ["7.7x", "21x"])
def test_one_ratio_and_of_what(dense_class, plan, tmp_path):
    plan = "kngpt2" if dense_class is GPT2LMHeadModel else plan
    dense = teacher(dense_class)
    save_folder(tmp_path / "m", student := compress(dense, plan).model)
    text = str(model_card(tmp_path / "m", "org/m"))
    ratio = f"{sum(p.numel() for p in dense.parameters()) / sum(p.numel() for p in student.parameters()):.2f}"
    assert f"it has {ratio} times fewer parameters than its dense twin" in " ".join(text.split())
    assert re.search(rf"\| parameters \| .* \| {ratio}x \|", text)


def test_the_snippet_asks_no_question_and_says_what_it_needs(tmp_path):
    save_folder(tmp_path / "m", compress(teacher(BertForMaskedLM)).model, bert_tokenizer(tmp_path))
    text = str(model_card(tmp_path / "m", "org/m"))
    assert 'AutoTokenizer.from_pretrained("org/m", trust_remote_code=True)' in text
    assert "It needs transformers >= 5.17 and Python >= 3.11." in text
    assert "Quantisers (torchao, torch.ao, bitsandbytes) and PEFT's `all-linear` look for `nn.Linear`" in text
    save_folder(tmp_path / "twin", to_dense(compress(teacher(BertForMaskedLM)).model), bert_tokenizer(tmp_path))
    text = str(model_card(tmp_path / "twin", "org/m-dense", twin_of="org/m"))
    assert 'AutoTokenizer.from_pretrained("org/m-dense")' in text
    assert "trust_remote_code" not in text
    assert "Quantisers" not in text


def test_a_sentence_encoder_is_one_on_the_hub_too(tmp_path):
    files = {"modules.json": [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in
                              (("Transformer", ""), ("Pooling", "1_Pooling"))],
             "1_Pooling/config.json": {"pooling_mode_cls_token": True}}  # fmt: skip
    save_folder(tmp_path / "m", compress(teacher(BertModel)).model)
    (tmp_path / "m" / "1_Pooling").mkdir()
    for name, content in files.items():
        (tmp_path / "m" / name).write_text(json.dumps(content))
    card = model_card(tmp_path / "m", "org/m")
    assert (card.data.library_name, card.data.pipeline_tag) == ("sentence-transformers", "sentence-similarity")
    assert "sentence-transformers" in card.data.tags
    assert 'model = SentenceTransformer("org/m", trust_remote_code=True)' in str(card)


def test_a_teacher_in_a_folder_is_named_by_it_whatever_it_was_made_from(tmp_path):
    folder, _ = student_folder(BertForMaskedLM, tmp_path)
    source = tmp_path / "my-finetuned"
    source.mkdir()
    (source / "README.md").write_text("---\nbase_model: org/grand\nlicense: mit\n---\n")
    write(folder, "results.json", {"options": {"teacher": str(source)}})
    card = model_card(folder, "org/tiny-new")
    assert "- Teacher: my-finetuned\n" in card.text
    assert "org/grand" not in card.text
    assert (card.data.base_model, card.data.license) == ("org/grand", "mit")
    assert "- Teacher: org/given\n" in model_card(folder, "org/tiny-new", base_model="org/given").text


def test_the_licence_is_that_of_the_teacher_and_of_no_model_before_it(tmp_path):
    folder, _ = student_folder(BertForMaskedLM, tmp_path)
    source = tmp_path / "my-finetuned"
    source.mkdir()
    (source / "README.md").write_text("---\nbase_model: org/grand\n---\n")
    write(folder, "results.json", {"options": {"teacher": str(source)}})
    hub = {
        "org/grand": {"license": "apache-2.0", "language": "en"},
        "org/teacher": {"license": "other", "license_name": "own-1.0", "license_link": "LICENSE"},
    }
    card = model_card(folder, "org/tiny-new", look_up=hub.__getitem__)
    assert (card.data.base_model, card.data.license, card.data.language) == ("org/grand", None, None)
    write(folder, "results.json", {"options": {"teacher": "org/teacher"}})
    named = model_card(folder, "org/tiny-new", look_up=hub.__getitem__).data
    assert (named.license, named.license_name, named.license_link) == ("other", "own-1.0", "LICENSE")
    own = model_card(folder, "org/tiny-new", license="mit", look_up=hub.__getitem__).data
    assert (own.license, own.license_name, own.license_link) == ("mit", None, None)


def test_scores_of_other_factors_are_left_out(tmp_path, caplog):
    folder, model = student_folder(BertForMaskedLM, tmp_path)
    write(folder, "results.json", {**RECORD, "factors_sha256": describe(model).factors_sha256})
    whole = model_card(folder, "org/tiny-new")
    assert whole.data.eval_results
    assert not caplog.text
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if name.endswith(".A")).mul_(0)
    model.save_pretrained(folder)
    card = model_card(folder, "org/tiny-new")
    assert not card.data.eval_results
    assert "was measured with other factors than these" in caplog.text


def test_first_lines_that_are_not_yaml_are_left_out_with_a_warning(tmp_path, caplog):
    (tmp_path / "README.md").write_text("---\nlicense: mit\nnote: a: b\n---\n")
    assert folder_metadata(tmp_path) == {}
    assert "README.md are not read" in caplog.text


@pytest.mark.parametrize(
    ("how", "said"),
    [({"runtime": "onnxruntime"}, "on cpu with onnxruntime, 2.50"), ({"compiled": True}, "on cpu with torch.compile"),
     ({"runtime": "torch", "compiled": False}, "on cpu, 2.50 times")],
)  # fmt: skip
def test_a_time_says_what_computed(how, said, tmp_path):
    folder, model = student_folder(BertForMaskedLM, tmp_path)
    write(folder, "benchmark.json", {**benchmark_of(model), **how})
    assert said in model_card(folder, "org/tiny-new").text


def test_tokens_that_were_not_counted_are_not_told(tmp_path):
    folder, _ = student_folder(BertForMaskedLM, tmp_path)
    write(folder, "results.json", {**RECORD, "training": {**RECORD["training"], "tokens": None}})
    assert "(38,400 samples, 10.0 minutes)" in model_card(folder, "org/tiny-new").text


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("/home/ada/bert", "./bert"),
        ("--teacher=/home/ada/secret/bert", "--teacher=./bert"),
        ("OSError: '/home/ada/x.json' is gone; see (/tmp/a/b)", "OSError: './x.json' is gone; see (./b)"),
        ("https://huggingface.co/org/model and org/model/a", "https://huggingface.co/org/model and org/model/a"),
        ("3 / 4 of and/or", "3 / 4 of and/or"),
        ("C:\\Users\\ada\\bert", "./bert"),
        ("--teacher=C:/Users/ada/bert --seed 3", "--teacher=./bert --seed 3"),
        ("--hub_token hf_abcdefghijklmnopqrstuvwxyz0123", "--hub_token hf_..."),
    ],
)
def test_local_paths_do_not_leave(text, cut, tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"options": {"command": [text]}}))
    assert json.loads(without_local_paths(tmp_path / "results.json")) == {"options": {"command": [cut]}}
