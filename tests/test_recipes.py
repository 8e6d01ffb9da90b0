import math
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
from transformers import BertModel, GPT2LMHeadModel

from kronecker_transformers import compress, recipes
from kronecker_transformers.compression.plan_file import read_plan
from kronecker_transformers.distillation import DistillationArguments
from kronecker_transformers.experiments.lessons import AUGMENTED, CAUSAL, SHARES, text_lesson
from kronecker_transformers.experiments.training import WARMUP
from kronecker_transformers.models.kronecker_family import FAMILIES
from kronecker_transformers.recipes import RECIPES, StudentOptions, parse_script
from kronecker_transformers.tasks.text import TextSource


@dataclass
class Options:
    """A script of two options."""

    output_dir: str
    task_name: str | None = None
    recipe: str = "kroneckerbert-7.7x"


@dataclass
class Script(StudentOptions):
    """One of a script that makes a student."""

    output_dir: str
    task_name: str | None = None
    recipe: str = "classifier"


@pytest.mark.parametrize(("name", "stage"), [(name, stage) for name, stages in RECIPES.items() for stage in stages])
def test_every_recipe_is_one_of_known_arguments(name, stage, tmp_path):
    recipe = RECIPES[name][stage]
    assert recipe.plan == "search" or any(recipe.plan in config.family.presets for config in FAMILIES.values())
    for task in (None, *recipe.by_task):
        arguments = DistillationArguments(str(tmp_path), **recipe.for_task(task))
        assert arguments.weights()


@pytest.mark.parametrize(
    ("recipe", "task", "learning_rate"),
    [
        ("kroneckerbert-7.7x", "sst2", 1e-4), ("kroneckerbert-7.7x", "cola", 5e-5), ("kroneckerbert-7.7x", "rte", 1e-5),
        ("kroneckerbert-21x", "sst2", 5e-4), ("kroneckerbert-21x", "qqp", 1e-4), ("kroneckerbert-21x", "rte", 5e-5),
    ],
)  # fmt: skip
def test_learning_rates_of_the_paper(recipe, task, learning_rate, tmp_path):
    argv = ["--output_dir", str(tmp_path), "--task_name", task, "--recipe", recipe, "--use_cpu"]
    options, arguments = parse_script(Options, "glue", argv)
    assert options.task_name == task
    assert arguments.learning_rate == learning_rate
    assert arguments.per_device_train_batch_size == 32
    assert (15 <= arguments.num_train_epochs <= 30) if task == "cola" else (5 <= arguments.num_train_epochs <= 15)
    assert set(arguments.weights().values()) == {1.0}
    assert not arguments.factor_learning_rates


def test_stage_1_of_the_paper(tmp_path):
    _, arguments = parse_script(Options, "mlm", ["--output_dir", str(tmp_path), "--use_cpu"])
    assert (arguments.learning_rate, arguments.per_device_train_batch_size, arguments.num_train_epochs) == (1e-3, 64, 3)
    assert "logits" not in arguments.weights()
    assert RECIPES["kroneckerbert-7.7x"]["mlm"].length == 512


def test_options_given_win_over_the_recipe(tmp_path):
    argv = ["--output_dir", str(tmp_path), "--learning_rate", "7e-4", "--logits_weight", "0", "--factor_learning_rates"]
    _, arguments = parse_script(Options, "glue", [*argv, "--use_cpu"])
    assert math.isclose(arguments.learning_rate, 7e-4)
    assert "logits" not in arguments.weights()
    assert arguments.factor_learning_rates
    assert arguments.output_dir == str(tmp_path / "checkpoints")


def test_our_recipes_are_what_distill_does(tmp_path):
    for stage, name, weights, objective, batch in (
        ("glue", "classifier", SHARES, "kronecker_bert", 32),
        ("embedding", "sentence-encoder", {}, "sentence_encoder", 64),
        ("clm", "language-model", CAUSAL, "kngpt2", 16),
    ):
        _, arguments = parse_script(Options, stage, ["--output_dir", str(tmp_path), "--recipe", name, "--use_cpu"])
        expected = DistillationArguments(str(tmp_path), objective=objective, **weights).weights()
        assert arguments.weights() == expected
        assert (arguments.muon, arguments.dropout, arguments.warmup_steps) == (True, 0, WARMUP)
        assert arguments.per_device_train_batch_size == batch
        assert arguments.balanced == (name != "sentence-encoder")
    assert RECIPES["classifier"]["glue"].augmented == RECIPES["sentence-encoder"]["embedding"].augmented == AUGMENTED


def test_our_recipe_for_a_language_model_reads_blocks_as_distill_does(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(f"{tiny.TEXT} {line}" for line in range(600)))
    teacher, tokenizer = tiny.teacher(GPT2LMHeadModel, n_positions=512), tiny.gpt2_tokenizer(tmp_path)
    lesson = text_lesson(teacher, tokenizer, TextSource((str(tmp_path / "text.txt"),)), 0)
    assert (lesson.length, lesson.batch) == (RECIPES["language-model"]["clm"].length, 16)


@pytest.mark.parametrize(
    ("hidden", "argv", "rate"),
    [(8, [], 1e-3), (384, [], 1e-3), (768, [], 2.5e-4), (768, ["--learning_rate", "5e-5"], 5e-5)],
)
def test_the_learning_rate_is_that_for_the_hidden_size_where_nobody_chose_one(hidden, argv, rate, tmp_path):
    argv = ["--output_dir", str(tmp_path), "--recipe", "classifier", "--use_cpu", *argv]
    options, arguments = parse_script(Script, "glue", argv)
    teacher = tiny.teacher(BertModel, hidden_size=hidden)
    options.choose_rate(arguments, teacher)  # as a student that is not factored
    assert math.isclose(arguments.learning_rate, rate if "--learning_rate" in argv else 0.3 * rate)
    options.choose_rate(arguments, compress(teacher, {"pooler.dense": (8, 8, 1)}).model)
    assert math.isclose(arguments.learning_rate, rate)
    options, arguments = parse_script(Script, "glue", [*argv, "--recipe", "kngpt2"])
    options.choose_rate(arguments, tiny.teacher(BertModel, hidden_size=hidden))
    assert arguments.learning_rate == (5e-5)  # of the recipe


@pytest.mark.parametrize(("given", "expected"), [("true", True), ("True", True), ("false", False), (None, False)])
def test_whether_to_resume_is_a_truth_value(given, expected, tmp_path):
    argv = ["--output_dir", str(tmp_path), "--recipe", "classifier", "--use_cpu"]
    resume = [] if given is None else ["--resume_from_checkpoint", given]
    assert parse_script(Script, "glue", [*argv, *resume])[1].resume_from_checkpoint is expected


def test_a_checkpoint_that_is_not_there_is_refused_at_once(tmp_path, capsys):
    argv = ["--output_dir", str(tmp_path), "--recipe", "classifier", "--use_cpu"]
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(SystemExit):
        parse_script(Script, "glue", [*argv, "--resume_from_checkpoint", str(tmp_path / "checkpoint-3")])
    assert "is no folder of a complete checkpoint" in capsys.readouterr().err


def test_tokens_are_in_no_record(tmp_path):
    secret = "hf_" + "a" * 30
    given = ["--hub_token", secret, f"--hub-token={secret}", "--seed", "3"]
    options, arguments = parse_script(Options, "glue", ["--output_dir", str(tmp_path), "--use_cpu", *given])
    assert arguments.hub_token == secret
    assert options.command[2:] == ["--output_dir", str(tmp_path), "--use_cpu", "--seed", "3"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"calibration": "missing.txt"}, FileNotFoundError, r"'missing\.txt' does not exist"),
        ({"calibration": "text.txt", "calibration_texts": 0}, ValueError, "--calibration_texts 0 must be at least 1"),
        ({"calibration": "text.txt", "calibration_texts": 9}, ValueError, "of 9 texts gives 9 sequences"),
        (
            {"calibration": "text.txt", "start": "earlier", "plan": None},
            ValueError,
            "earlier has factors of its own",
        ),
        ({"plan": "kngpt2"}, ValueError, "plan='kngpt2' is not a preset for bert"),
        ({"ratio": 2.0}, ValueError, r"ratio=2\.0 was given beside a plan"),
        ({"start": "earlier", "plan": None, "ratio": 2.0}, ValueError, r"its own plan, and ratio=2\.0 was given"),
        ({"start": "earlier"}, ValueError, r"--start earlier has its own plan, and --plan .* was given; leave one out"),
        ({"plan": "search"}, ValueError, '"search" needs calibration text'),
        ({"plan": "search", "calibration": "text.txt", "ratio": 1e6}, ValueError, r"ratio=1,?000,?000.* cannot be met"),
    ],
)
def test_what_a_student_cannot_start_from(options, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the dog jumps\n" * 20)
    teacher, tokenizer, recipe = tiny.teacher(BertModel), tiny.bert_tokenizer(tmp_path), RECIPES["kngpt2"]["glue"]
    plan = tmp_path / "plan.json"
    plan.write_text('{"pooler.dense": {"m1": 8, "n1": 8}}')
    compress(teacher, read_plan(plan)).save_pretrained("earlier")
    given = StudentOptions(**{"plan": str(plan), **options})
    for refused in (given.check, given.student):
        with pytest.raises(error, match=message):
            refused(teacher, tokenizer, recipe)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--recipe", "kngpt3"],
            "--recipe 'kngpt3' is not known for this stage; choose one of classifier, kngpt2",
        ),
        (["--learning_rat", "1"], "unknown option '--learning_rat'"),
        (["--learning_rate", "fast"], "invalid float value: 'fast'"),
        (["--pooled_weight", "-2"], "pooled_weight=-2.0 must be a finite number >= 0"),
    ],
)
def test_bad_options_end_with_one_message(argv, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_script(Options, "glue", ["--output_dir", str(tmp_path), *argv])
    assert message in capsys.readouterr().err


def test_several_gpus_in_one_process_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(DistillationArguments, "n_gpu", 2)
    with pytest.raises(SystemExit):
        parse_script(Options, "glue", ["--output_dir", str(tmp_path), "--recipe", "kngpt2"])
    assert "one process sees 2 GPUs; start one process for each with torchrun" in capsys.readouterr().err


def test_recipe_files_say_where_their_numbers_come_from():
    for path in (Path(recipes.__file__).parent).glob("*.yaml"):
        assert re.match(
            r"# (KroneckerBERT|KnGPT2), sections [^:]+: |# Ours: .* benchmarks/\w+\.py", path.read_text()
        ), path


@pytest.mark.parametrize("content", ["- a list", "mlm: {length: 3}", "mlm: {plan: 7.7x, lenght: 3}", "mlm: [", "3"])
def test_a_file_that_is_no_recipe(content, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"recipe\.yaml.*does not map stages to plan, length and arguments"):
        recipes.read_recipe(path)
