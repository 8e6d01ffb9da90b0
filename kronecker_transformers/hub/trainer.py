"""A Trainer whose pushes to the Hub are whole: one commit each, with the model's code and card, without any pickle."""

from __future__ import annotations

import inspect
import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import Trainer
from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils.hub import PushInProgress

from ..checkpoint.files import to_json
from ..evaluation.timing import environment
from .card import model_card
from .files import CARD, RESULTS_FILE, published_files, without_local_paths
from .push import Pushed, card_metadata, push

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"


class PublishingTrainer(Trainer):
    """What the pushes of the base class leave out or send too much of.

    A push in the middle of a training has the Python files with which the model loads, and a card of what was done so
    far; optimizer, random states and training arguments, which are pickles, stay here. With `hub_strategy` checkpoint
    or all_checkpoints the model and the Trainer's state lie in a folder of the repository too, in the same commit.

    The base class has no public place for what a push in the middle of a training sends, so a private method of it is
    replaced here (`tests/hub/test_trainer.py` says when that is needed no more).
    """

    hub_model_id: Any
    push_in_progress: Any

    def record(self) -> dict[str, Any]:
        """What is known of the training so far, for the card: the content of ``results.json``."""
        raise NotImplementedError

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **card: Any,
    ) -> Any:
        """As the base class; `card` are arguments of `model_card`, such as `license`.

        Returns:
            The commit, `push.Pushed`; a future of it if not `blocking`.

        Raises:
            TypeError: what `model_card` does not take, such as `finetuned_from` of the base class; nothing is sent.
            OSError: as `push.push`.
        """
        if unknown := card.keys() - inspect.signature(model_card).parameters.keys():
            raise TypeError(
                f"push_to_hub has no argument {sorted(unknown)[0]!r}: the card says what was recorded; give arguments "
                "of model_card, such as license, language and base_model"
            )
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        draft = self._draft(Path(self.args.output_dir or ""), **card)
        work = self._sent(draft, commit_message, {}, token or self.args.hub_token, revision, private)
        return work.result() if blocking else work

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        strategy = self.args.hub_strategy
        if not self.is_world_process_zero() or strategy == HubStrategy.END:
            return
        pending = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if pending and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        draft = self._draft(Path(checkpoint_folder))
        place = "last-checkpoint" if strategy == HubStrategy.CHECKPOINT else Path(checkpoint_folder).name
        also: dict[str, Path | bytes] = {}
        if strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            also = {f"{place}/{file.name}": file.source for file in published_files(draft) if file.name != CARD}
            also[f"{place}/{STATE_FILE}"] = without_local_paths(Path(checkpoint_folder) / STATE_FILE)
        by_step = self.args.save_strategy == SaveStrategy.STEPS
        when = f"step {self.state.global_step}" if by_step else f"epoch {int(self.state.epoch or 0)}"
        job = self._sent(draft, f"Training in progress, {when}", also, token=self.args.hub_token)
        if pending:
            self.push_in_progress.jobs.append(job)
        else:
            self.push_in_progress = PushInProgress([job])  # type: ignore[arg-type]  # a list, as its code says

    @cached_property
    def _look_up(self) -> Callable[[str], dict[str, Any]]:
        """Asks for the card of a teacher once."""
        return cache(partial(card_metadata, token=self.args.hub_token))

    def _draft(self, folder: Path, **card: Any) -> Path:
        """A folder of its own with what is to be sent: the other one may go before the push has ended."""
        draft = Path(tempfile.mkdtemp(prefix="push-"))
        try:
            for file in published_files(folder):
                if file.name not in (CARD, RESULTS_FILE):
                    file.write(draft)
            record = {**self.record(), "environment": environment()}
            (draft / RESULTS_FILE).write_text(to_json(record), encoding="utf-8")
            text = str(model_card(draft, self.hub_model_id, **{"look_up": self._look_up, **card}))
            (draft / CARD).write_text(text, encoding="utf-8")
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        return draft

    def _sent(
        self,
        draft: Path,
        message: str | None,
        also: Mapping[str, Path | bytes],
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> Future[Pushed]:
        """Push a draft in the background, one after the other."""

        def work() -> Pushed:
            try:
                return push(
                    draft,
                    self.hub_model_id,
                    private=self.args.hub_private_repo if private is None else private,
                    revision=revision or self.args.hub_revision,
                    message=message,
                    also=also,
                    card=ModelCard.load(draft / CARD),
                    token=token,
                )
            except (OSError, ValueError) as error:
                logger.warning("%s; a training goes on, and the next push sends everything", error)
                raise
            finally:
                shutil.rmtree(draft, ignore_errors=True)

        if getattr(self, "_pushes", None) is None:
            self._pushes = ThreadPoolExecutor(1, thread_name_prefix="push")
        return self._pushes.submit(work)
