"""Hyper-parameters by name, the papers' and ours, and the command lines of the examples that use them."""

from __future__ import annotations

import copy
import dataclasses
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers import HfArgumentParser, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ..checkpoint.load import source_name
from ..compression.activations import Text, calibration_batches
from ..compression.compress import is_searched, planned
from ..compression.plan_file import read_plan
from ..distillation import DistillationArguments, start_student
from ..distillation.checkpoints import is_complete
from ..distillation.objective import Objective
from ..distillation.optimizer import DENSE_RATE, FACTORED_RATE, rate_for_size
from ..experiments.lessons import calibration_lines
from ..models.kronecker_family import FACTORED_CLASSES
from ..tasks.text import TextSource


@dataclass(frozen=True)
class Recipe:
    """What is done in one stage.

    Attributes:
        plan: how the teacher is factored.
        length: longest sequence, in tokens.
        arguments: what it sets of `DistillationArguments`; without a learning rate, it is that for the hidden size.
        by_task: the same for single tasks.
        augmented: share of a task's texts that are augmented in each epoch, or of sentences in all but the first.
    """

    plan: str
    length: int
    arguments: Mapping[str, Any]
    by_task: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    augmented: float = 0.0

    def for_task(self, task: str | None) -> dict[str, Any]:
        """The arguments for one task."""
        return {**self.arguments, **self.by_task.get(task or "", {})}


@dataclass(kw_only=True)
class StudentOptions:
    """Options that all examples share: how the student starts."""

    plan: str | None = field(
        default=None, metadata={"help": 'Preset, plan file, or "search"; default: that of the recipe.'}
    )
    ratio: float | None = field(
        default=None, metadata={"help": "Of a search; default: that of the family's first preset, 7.7 or 1.48."}
    )
    start: str | None = field(
        default=None, metadata={"help": "Student of an earlier stage to go on from, with its own plan."}
    )
    calibration: str | None = field(
        default=None,
        metadata={"help": "Text for which the first factors are fitted; default: for a search, that of the training."},
    )
    calibration_texts: int | None = field(
        default=None,
        metadata={"help": "Sentences of it, from its start; default: enough for the teacher, from all over it."},
    )
    command: list[str] = field(init=False, default_factory=list)
    """The command line, for the record."""
    rate_by_size: bool = field(init=False, default=False)
    """Whether neither the command line nor the recipe has a learning rate."""

    def student(
        self,
        teacher: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        recipe: Recipe,
        texts: Sequence[Text] | None = None,
        counted: Sequence[Text] | None = None,
        progress: bool = False,
    ) -> PreTrainedModel:
        """The student at its start.

        Args:
            teacher: with the head that the student will have.
            tokenizer: of the teacher.
            recipe: for what the command line leaves open.
            texts: of the training, for a search without `--calibration`.
            counted: more of them, of which only the words are counted.
            progress: show progress bars.

        Raises:
            ValueError, OSError: as `check`.
        """
        if self.start is None:
            self.plan = self.plan or recipe.plan  # for the record
        plan, chosen = read_plan(self.plan or recipe.plan), self._texts(teacher, tokenizer, recipe, texts)
        if self.calibration is not None or chosen is None:
            counted = None  # of other texts
        return start_student(
            teacher, plan, self.start, ratio=self.ratio, calibration=chosen,
            counted=counted, tokenizer=tokenizer, progress=progress,
        )  # fmt: skip

    def check(
        self,
        teacher: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        recipe: Recipe,
        texts: Sequence[Text] | None = None,
        arguments: DistillationArguments | None = None,
    ) -> None:
        """Refuse what would be refused only after the training of the teacher, or the search for a plan.

        Args:
            teacher, tokenizer, recipe, texts: as for `student`.
            arguments: of the distillation.

        Raises:
            ValueError, OSError: a plan, a ratio or a student of an earlier stage that does not fit; or calibration text
                that is missing, too little, or given beside such a student; or losses that do not fit the models.
        """
        plan, chosen = read_plan(self.plan or recipe.plan), self._texts(teacher, tokenizer, recipe, texts)
        student: PreTrainedModel | None = None
        if self.start is not None:
            student = start_student(teacher, plan, self.start, ratio=self.ratio)
        if arguments is not None:
            like = student or copy.deepcopy(teacher)
            smoothing = arguments.label_smoothing_factor
            Objective(like, teacher, arguments.weights(), layer_map=arguments.layer_map, label_smoothing=smoothing)
        if student is not None:
            return
        planned(teacher, plan, self.ratio, None, has_text=chosen is not None)
        if chosen is not None:
            calibration_batches(chosen, tokenizer, teacher)

    def choose_rate(self, arguments: DistillationArguments, student: PreTrainedModel) -> None:
        """Set the learning rate for a student of this hidden size, factored or dense, where nobody has chosen one."""
        if self.rate_by_size:
            rate = DENSE_RATE if type(student) in FACTORED_CLASSES else FACTORED_RATE
            arguments.learning_rate = rate_for_size(rate, student.config.hidden_size)

    def _texts(
        self,
        teacher: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        recipe: Recipe,
        texts: Sequence[Text] | None,
    ) -> Sequence[Text] | None:
        if self.start is not None and self.plan is not None:
            raise ValueError(f"--start {self.start} has its own plan, and --plan {self.plan} was given; leave one out")
        if self.calibration is None:
            searched = self.start is None and is_searched(self.plan or recipe.plan)
            return texts if searched else None
        if self.start is not None:
            raise ValueError(
                f"--start {self.start} has factors of its own, and --calibration would replace them; give one of both"
            )
        number = self.calibration_texts
        if number is not None and number < 1:
            raise ValueError(f"--calibration_texts {number} must be at least 1; leave it out to have enough of them")
        return calibration_lines(TextSource((self.calibration,)), teacher, tokenizer, number=number)


@dataclass(kw_only=True)
class AugmentationOptions(StudentOptions):
    """Options of the examples whose texts can be augmented."""

    augmented: float | None = field(
        default=None,
        metadata={
            "help": "Share of the texts augmented in each epoch (of plain sentences: in all but the first), 0 to 1; "
            "default: the recipe's."
        },
    )

    def __post_init__(self) -> None:
        if self.augmented is not None and not 0 <= self.augmented <= 1:
            raise ValueError(f"--augmented {self.augmented} must be from 0 to 1, a share of the texts; correct it")

    def choose_augmented(self, recipe: Recipe) -> float:
        """The share that was asked for, or that of the recipe; it goes into the record."""
        self.augmented = recipe.augmented if self.augmented is None else self.augmented
        return self.augmented


CHECKPOINTS = "checkpoints"
"""Folder of the Trainer's checkpoints within the output folder of an example."""


def read_recipe(path: str | Path) -> dict[str, Recipe]:
    """The stages of a recipe file.

    Args:
        path: a YAML file: for each stage `plan`, `length`, `arguments` and perhaps `by_task` and `augmented`.

    Raises:
        ValueError: it is no such file.
        OSError: it cannot be read.
    """
    try:
        stages = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        return {stage: Recipe(**{**fields, "plan": str(fields["plan"])}) for stage, fields in stages.items()}
    except (yaml.YAMLError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"recipe file {str(path)!r} does not map stages to plan, length and arguments ({error}); correct it"
        ) from error


RECIPES = {path.stem: read_recipe(path) for path in sorted(Path(__file__).parent.glob("*.yaml"))}
"""Recipes by name and stage: mlm (stage 1 of BERT), glue, squad, clm, embedding."""

_Script = TypeVar("_Script")


def parse_script(script: type[_Script], stage: str, argv: Sequence[str] | None = None) -> tuple[_Script, Any]:
    """The command line of an example: its own options, and those of `DistillationArguments` with a recipe's defaults.

    Random numbers begin at the seed of the arguments from here on.

    Args:
        script: dataclass of the example's own options, with the field `recipe` and perhaps `task_name`.
        stage: which stage of the recipe it runs.
        argv: the command line without the program; default: that of the process.

    Returns:
        The example's options, and the `DistillationArguments`.

    Raises:
        SystemExit: after a message, for an unknown option or a value that is refused.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    names = [name for name, stages in RECIPES.items() if stage in stages]
    own: Any = script
    arguments_class: Any = DistillationArguments
    training: Any = HfArgumentParser(
        arguments_class, add_help=False, allow_abbrev=False, usage="--help and --help_training list all options"
    )
    parser: Any = HfArgumentParser(
        own,
        description=(sys.modules[script.__module__].__doc__ or "").split("\n")[0],
        epilog=f"Recipes: {', '.join(names)}. Every option of DistillationArguments and TrainingArguments works too; "
        "--help_training lists them.",
        allow_abbrev=False,
    )
    parser.add_argument("--help_training", action="store_true", help="list the options of the training and exit")
    options, rest = parser.parse_known_args(argv)
    if options.help_training:
        training.print_help()
        parser.exit()
    if options.recipe not in names:
        parser.error(f"--recipe {options.recipe!r} is not known for this stage; choose one of {', '.join(names)}")
    recipe = RECIPES[options.recipe][stage]
    training.set_defaults(
        output_dir=str(Path(options.output_dir) / CHECKPOINTS),
        **{"learning_rate": None, **recipe.for_task(getattr(options, "task_name", None))},
    )
    namespace, unknown = training.parse_known_args(rest)
    if unknown:
        parser.error(f"unknown option {unknown[0]!r}; --help and --help_training list the known ones")
    try:
        chosen = {f.name: getattr(options, f.name) for f in dataclasses.fields(own) if f.init}
        for name in {"teacher", "train_text", "train_file"} & chosen.keys():
            given = chosen[name]
            chosen[name] = list(map(source_name, given)) if isinstance(given, list) else given and source_name(given)
        inits = {f.name for f in dataclasses.fields(DistillationArguments) if f.init}
        wanted = {key: value for key, value in vars(namespace).items() if key in inits}
        if wanted["include_num_input_tokens_seen"] in ("no", False):
            wanted["include_num_input_tokens_seen"] = "non_padding"  # the results tell how much the student has seen
        by_size = wanted["learning_rate"] is None
        if by_size:
            del wanted["learning_rate"]
        arguments = DistillationArguments(**wanted)
        arguments.resume_from_checkpoint = _checked_resume(arguments.resume_from_checkpoint)
        if arguments.deepspeed_plugin is not None and arguments.deepspeed_plugin.zero_stage == 3:
            raise ValueError(
                "stage 3 of ZeRO divides teacher and student, which this script loads, saves and judges whole; choose "
                "stage 1 or 2, or use DistillationTrainer in a script of your own"
            )
        if arguments.n_gpu > 1 and not getattr(options, "teacher_only", False):
            raise ValueError(
                f"one process sees {arguments.n_gpu} GPUs; start one process for each with torchrun, or choose one by "
                "CUDA_VISIBLE_DEVICES"
            )
        set_seed(arguments.seed)  # a new head of a teacher is drawn before the Trainer sets it
        found: Any = script(**chosen)
        program = f"examples/{Path(sys.modules[script.__module__].__file__ or '').name}"
        found.rate_by_size = by_size
        found.command = ["python", program, *_without_tokens(argv)]
        return found, arguments
    except (ValueError, OSError) as error:
        parser.error(str(error))
        raise  # parser.error does not return


def _checked_resume(given: Any) -> Any:
    """A truth value as such, or the folder of a checkpoint that is whole."""
    if str(given).lower() in ("none", "true", "false"):
        return str(given).lower() == "true"
    if not is_complete(Path(given)):
        raise ValueError(
            f"--resume_from_checkpoint {given!r} is no folder of a complete checkpoint (no readable "
            "trainer_state.json); give another, or true for the newest one in the output folder"
        )
    return given


def _without_tokens(argv: list[str]) -> list[str]:
    """Without options like --hub_token and their values, since the command is recorded and published."""
    secret = re.compile(r"--[\w-]*token(=.*)?", re.DOTALL)
    return [
        part
        for before, part in zip(["", *argv], argv, strict=False)
        if not secret.fullmatch(part) and not (secret.fullmatch(before) and "=" not in before)
    ]
