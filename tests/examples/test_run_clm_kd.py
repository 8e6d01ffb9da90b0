import json
import shutil

import pytest
import tiny
import torch
from examples_runner import load_example, run_example
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, GPT2Model

from kronecker_transformers.tasks.perplexity import perplexity

PLAN = "wte: {m1: 72, n1: 16}\nh.1.mlp.c_proj: {m1: 16, n1: 96}\nh.1.attn.c_attn: {m1: 24, n1: 16}\n"
WORDS = tiny.TEXT.split()


@pytest.fixture
def workplace(tmp_path):
    """A teacher, a plan and text."""
    (tmp_path / "plan.yaml").write_text(PLAN)
    lines = [" ".join(WORDS[(i * 5 + j) % len(WORDS)] for j in range(3 + i % 7)) for i in range(80)]
    (tmp_path / "train.txt").write_text("\n\n".join("\n".join(lines[i : i + 8]) for i in range(0, 80, 8)))
    (tmp_path / "held_out.txt").write_text("\n".join(lines[3:40:4]))
    save_teacher(tmp_path / "teacher", GPT2LMHeadModel)
    return tmp_path


def save_teacher(folder, dense_class):
    folder.mkdir()
    tokenizer = tiny.gpt2_tokenizer(folder)
    tiny.teacher(dense_class).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run(workplace, out="out", **options):
    defaults = {} if {"layers", "start"} & options.keys() else {"plan": workplace / "plan.yaml"}
    return run_example(
        "run_clm_kd", workplace / out, **{"teacher": workplace / "teacher", "train_text": [workplace / "train.txt"],
        "validation_text": workplace / "held_out.txt", "max_length": 24, "window": 24, "stride": 7,
        "disable_tqdm": True, "per_device_train_batch_size": 4, **defaults, **options},
    )  # fmt: skip


def test_end_to_end(workplace, capsys):
    results = run(workplace, recipe="kngpt2", max_steps=40, learning_rate=0.01, normalisation="wikitext")
    assert results["models"] == ["teacher", "student, undistilled", "student"]
    assert results["training"] == {**results["training"], "steps": 40, "samples": 160, "tokens": 160 * 24}
    rows = results["rows"]
    assert rows["parameters"][1] == rows["parameters"][2] < rows["parameters"][0]
    _, undistilled, student = rows["perplexity per token"]
    assert student < 0.6 * undistilled
    assert all(word > token for word, token in zip(rows["perplexity per word"], rows["perplexity per token"],
                                                   strict=True))  # fmt: skip
    assert results["protocol"].startswith("window 24, stride 7, text normalisation: wikitext; ")
    printed = " ".join(capsys.readouterr().out.split())
    assert "perplexity per word" in printed
    assert "window 24, stride 7" in printed

    loaded = AutoModelForCausalLM.from_pretrained(workplace / "out" / "student")
    assert type(loaded).__name__ == "KroneckerGPT2LMHeadModel"
    assert loaded.lm_head.A is loaded.transformer.wte.A
    assert loaded.num_parameters() == rows["parameters"][2]
    tokenizer = tiny.gpt2_tokenizer(workplace)
    found = perplexity(loaded, tokenizer, (workplace / "held_out.txt").read_text(), window=24, stride=7)
    assert found.per_token == pytest.approx(student, rel=1e-5)
    assert found.per_word == pytest.approx(rows["perplexity per word"][2], rel=1e-5)


def test_our_recipe_searches_a_plan_on_the_text_and_the_papers_does_not(workplace):
    options = {"teacher": workplace / "teacher", "train_text": [workplace / "train.txt"], "disable_tqdm": True,
               "max_length": 24, "max_steps": 2}  # fmt: skip
    ours = run_example("run_clm_kd", workplace / "ours", ratio=2.0, **options)
    papers = run_example("run_clm_kd", workplace / "papers", recipe="kngpt2", **options)
    assert (ours["options"]["plan"], papers["options"]["plan"]) == ("search", "kngpt2")
    parameters = ours["rows"]["parameters"]
    assert 1.9 < parameters[0] / parameters[2] < 2.2
    terms = {"embedding_mse", "attention_kl", "hidden_mse", "supervised"}
    assert papers["training"]["objective"] == dict.fromkeys(terms, 1.0)
    assert (papers["training"]["optimizer"], papers["training"]["learning_rate"]) == ("adamw_torch_fused", 0.00025)
    balanced = ours["training"]["objective"]
    assert set(balanced) == {*terms, "logits"}
    assert min(balanced.values()) < max(balanced.values())
    assert (ours["training"]["optimizer"], ours["training"]["learning_rate"]) == ("Muon and AdamW", 0.001)


def test_layers_of_the_teacher(workplace):
    results = run(workplace, layers="0,2", max_steps=2)
    rows = results["rows"]
    teacher = GPT2LMHeadModel.from_pretrained(workplace / "teacher")
    one = sum(parameter.numel() for parameter in teacher.transformer.h[1].parameters())
    assert rows["parameters"] == [teacher.num_parameters(), *[teacher.num_parameters() - one] * 2]
    student = AutoModelForCausalLM.from_pretrained(workplace / "out" / "student")
    assert type(student) is GPT2LMHeadModel
    assert student.config.n_layer == 2
    assert student.lm_head.weight is student.transformer.wte.weight
    last = (student.transformer.h[1].mlp.c_fc.weight, teacher.transformer.h[2].mlp.c_fc.weight)
    torch.testing.assert_close(*last, rtol=0, atol=0.01)
    training = results["training"]
    assert (training["optimizer"], training["learning_rate"]) == ("adamw_torch_fused", 3e-4)  # of dense students


def test_an_earlier_student_goes_on(workplace):
    run(workplace, max_steps=2)
    results = run(workplace, "more", start=workplace / "out" / "student", max_steps=-1, num_train_epochs=1)
    assert results["training"]["steps"] > 3
    first, more = (load_file(workplace / out / "student" / "model.safetensors") for out in ("out", "more"))
    assert {name: value.shape for name, value in first.items()} == {name: value.shape for name, value in more.items()}


def test_a_run_that_stopped_goes_on_with_the_text_that_follows(workplace):
    options = {"dropout": 0, "max_steps": 4}
    run(workplace, "whole", **options)
    run(workplace, "stopped", **options)
    stopped = workplace / "stopped"
    shutil.rmtree(stopped / "student")
    shutil.rmtree(stopped / "checkpoints" / "checkpoint-4")
    results = run(workplace, "stopped", resume_from_checkpoint=True, **options)
    assert results["training"]["steps"] == 4
    expected, found = (load_file(workplace / out / "student" / "model.safetensors") for out in ("whole", "stopped"))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda m, n=name: f"{n}: {m}")


def test_without_validation_text_and_with_the_models_maximum(workplace):
    results = run_example(
        "run_clm_kd", workplace / "out", teacher=workplace / "teacher", train_text=[workplace / "train.txt"],
        plan=workplace / "plan.yaml", disable_tqdm=True, per_device_train_batch_size=2,
    )  # fmt: skip
    assert set(results["rows"]) == {"parameters"}
    assert results["protocol"] is None
    assert results["training"]["tokens"] == 6 * 40  # the recipe's 512, as far as the teacher goes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 41}, "max_length=41 must be from 2 to the teacher's 40 tokens"),
        ({"window": 41}, "window=41 must be from 2 to the teacher's 40 tokens"),
        ({"stride": 24}, "stride=24 must be at least 1 and below window=24"),
        ({"layers": "0,3"}, r"layers=\[0, 3\] must be layers of the teacher"),
        ({"save_strategy": "epoch"}, "--save_strategy epoch: a stream of examples has no end of an epoch; give steps"),
        ({"train_sampling_strategy": "sequential"}, "_strategy sequential: a stream of examples is shuffled in a buff"),
        ({"auto_find_batch_size": True}, "--auto_find_batch_size: the steps of a stream are counted for the batches"),
        ({"layer_map": [0, 1]}, r"layer_map=\[0, 1\] must give for each of the 3 layers"),
        ({"validation_text": "white.txt"}, r"validation_text 'white\.txt' has 0 words; give another, or leave it out"),
    ],
)
def test_clear_refusals(options, message, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    (workplace / "white.txt").write_text(" \n\n")
    with pytest.raises(ValueError, match=message):
        run(workplace, **options)


def test_perplexity_of_a_table_is_that_of_its_documents(workplace):
    documents = (workplace / "held_out.txt").read_text().splitlines()
    (workplace / "held_out.txt").write_text("\n\n".join(documents))
    (workplace / "held_out.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents))
    one, other = (
        run(workplace, name, validation_text=workplace / f"held_out.{name}", max_steps=1) for name in ("txt", "jsonl")
    )
    assert one["rows"] == other["rows"]
    with pytest.raises(FileNotFoundError, match=r"'missing\.txt' does not exist"):
        run(workplace, "missing", validation_text="missing.txt")


def test_refuses_a_teacher_without_its_head(workplace):
    save_teacher(workplace / "base", GPT2Model)
    with pytest.raises(ValueError, match="is a GPT2Model; a GPT2LMHeadModel is needed"):
        run(workplace, teacher=workplace / "base")


def test_too_little_text_is_an_error(workplace):
    (workplace / "train.txt").write_text("the dog")
    with pytest.raises(ValueError, match="the text gives 0 examples; give more text"):
        run(workplace)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        *(
            (
                ["--layers", "0,2", *option],
                "makes a dense student; leave out --plan, --ratio, --start and --calibration",
            )
            for option in (["--plan", "x"], ["--ratio", "2"], ["--start", "x"], ["--calibration", "x"])
        ),
        (["--layers", "a"], "--layers 'a' must be numbers with commas between them"),
        (["--normalisation", "lower"], "invalid choice: 'lower'"),
    ],
)
def test_refuses_bad_options(extra, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        load_example("run_clm_kd").main(
            ["--teacher", "a", "--train_text", "b", "--output_dir", str(tmp_path / "out"), *extra]
        )
    assert message in " ".join(capsys.readouterr().err.split())
