"""One run under way: steps, evaluations and checkpoints in their order, and how it ends and goes on."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from tqdm import tqdm

from nf4format.adapter import CONFIG_NAME

from ..adapters import save_adapter
from ..data.batches import Batch
from ..data.dataset import Dataset
from ..data.plan import Batches
from ..data.preview import expected_time
from ..errors import TrainError
from ..model.decoder import CausalLM
from ..paging.optim import PagedAdamW
from .checkpoint import (
    Checkpoint,
    RunState,
    checkpoint_path,
    list_checkpoints,
    remove_old,
    restore,
    write_checkpoint,
)
from .evaluation import best_step, evaluate, gives_up_at, perplexity_of
from .options import TrainOptions
from .progress import StepNumbers, StepReports, TrainSummary
from .resume import check_same_run
from .runlog import RunLog
from .schedule import rate_factor
from .signals import StopRequest
from .sinks import Sinks
from .step import not_finite, relieved, train_step
from .weight_change import WeightChange, parameters_fingerprint

SHOWN_PLACES = 4
STEPS_TO_KNOW_SPEED = 5


@dataclass
class Run:
    """Everything that a run works with.

    Attributes:
        plan: the micro-batches of each step.
        evaluation: examples to evaluate on, or None.
        state: what of the run is known before its first step; steps and counters are in `summary`.
        log, timing: what it computes, and how long that takes. sinks: where numbers go besides.
        stop: asked after each step.
        say: takes lines about evaluations and checkpoints.
    """

    model: CausalLM
    optimizer: PagedAdamW
    options: TrainOptions
    plan: Batches
    evaluation: Dataset | None
    state: RunState
    summary: TrainSummary
    log: RunLog
    timing: RunLog
    sinks: Sinks
    stop: StopRequest
    bar: tqdm
    say: Callable[[str], None]

    def __post_init__(self) -> None:
        logs = (self.log, self.timing, self.sinks)
        self._reports = StepReports(self.summary, logs, self.bar, self.optimizer, self.say)
        self._weights = WeightChange(self.model)
        self._beginning = (0, 0, 0.0)  # steps, tokens and seconds when this process took over
        self._has_told_time = False
        self._saved_step: int | None = None  # of the newest checkpoint of this run
        self._leaves_checkpoint = self.options.save_every > 0

    def go_on_from(self, checkpoint: Checkpoint) -> None:
        """Take everything back to where it was when the checkpoint was made.

        Raises:
            TrainError: the checkpoint is that of another run, or the logs are.
            FormatError: the checkpoint cannot be read.
        """
        state, summary = checkpoint.state, self.summary
        for warning in check_same_run(state, self.state, self.options, checkpoint.path):
            self.say(f"warning: {warning}")
        for log, position in ((self.log, state.log), (self.timing, state.timing)):
            try:
                log.resume(position)
            except TrainError as error:
                if not self.options.force:
                    raise
                self.say(f"beginning a new log: {error}")
        restore(checkpoint, self.model, self.optimizer)
        try:
            self.model.passes.graphs.follow(state.passes)
        except (KeyError, TypeError, ValueError) as error:
            raise TrainError(checkpoint.path, f"not the state of a run: {error}") from None
        summary.steps, summary.tokens, summary.seconds = state.step, state.tokens, state.seconds
        self._beginning = (state.step, state.tokens, state.seconds)
        summary.evaluations.update(state.evaluations)
        self._saved_step, self._leaves_checkpoint = state.step, True
        self.bar.update(state.step)
        self.say(f"going on from {checkpoint.path}, after step {state.step}")

    def begin(self) -> None:
        """Remove what an earlier run left, which would be taken for this one's.

        Raises:
            TrainError: another run to the same output is under way.
        """
        for log in (self.log, self.timing):
            log.check_free()
        for path in list_checkpoints(self.options.checkpoints_path):
            shutil.rmtree(path)
        if (self.options.best_path / CONFIG_NAME).exists():
            shutil.rmtree(self.options.best_path)

    def go(self) -> None:
        """From the step where it is to the last one, or until it is to stop; the adapter is saved then.

        Raises:
            TrainError: a loss or gradient is not finite, a log cannot be written.
            WriteError: the adapter or a checkpoint cannot be written.
        """
        options, summary = self.options, self.summary
        self.model.train()
        self._evaluate_if_due()
        while not self._is_over():
            self._step(summary.steps + 1 + self._reports.unread)
            self._tell_time()
            # A GPU's numbers are read when the next step is under way, unless something hangs on them.
            done = summary.steps + self._reports.unread
            is_saved = options.save_every > 0 and done % options.save_every == 0
            hangs = is_saved or self._is_due(done) or self.stop.signal is not None
            if hangs or self.model.device.type == "cpu":
                self._reports.catch_up()
                self._evaluate_if_due()
                if is_saved and self.stop.signal is None:
                    self._save_checkpoint()
        self._reports.catch_up()
        if self.stop.signal is not None:
            summary.stopped_by = self.stop.signal.name
            self._leaves_checkpoint = True
        if self._leaves_checkpoint:
            self._save_checkpoint()
        if summary.steps and parameters_fingerprint(self.model) == self.state.start:
            problem = f"nothing was learned: {summary.steps} steps have changed no parameter"
            raise TrainError(options.out, problem, remedy="raise --lr, or use --adapter-dtype float32")
        summary.weights = self._weights.measure()
        save_adapter(self.model, options.out)

    def _is_over(self) -> bool:
        """Whether no step follows the ones begun so far."""
        if self.stop.signal is not None:
            return True
        given_up = gives_up_at(self.summary.evaluations, self.options.patience, self.options.min_delta)
        if given_up is not None:
            self.summary.gave_up = True
            waited = f"{self.options.patience} evaluations without a better one"
            self.say(f"stopping early after step {given_up}: {waited}")
        return given_up is not None or self.summary.steps + self._reports.unread >= self.plan.steps

    def _step(self, step: int) -> None:
        """One optimizer step, counted from 1; on a GPU its results come later."""
        options, plan = self.options, self.plan
        rate = options.lr * rate_factor(
            step - 1,
            steps=plan.steps,
            warmup=options.warmup_steps(plan.steps),
            schedule=options.schedule,
            floor=options.min_lr_ratio,
        )
        micro_batches = plan.step(step - 1)
        tokens = sum(batch.num_tokens for batch in micro_batches)
        numbers = StepNumbers(step, tokens, rate, self.optimizer, lambda: self._places(micro_batches))
        loss, norm = train_step(
            self.model,
            self.optimizer,
            micro_batches,
            rate=rate,
            clip=options.clip,
            step=step,
            before_update=self._reports.catch_up,
            places=self._places,
        )
        numbers.send(loss, norm)
        self._reports.add(numbers)

    def _places(self, batches: Sequence[Batch]) -> str:
        """Where the examples of some batches are from, the first few of them."""
        places = [place for batch in batches for place in self.plan.places(batch)]
        more = len(places) - SHOWN_PLACES
        return "; ".join(places[:SHOWN_PLACES]) + (f"; and {more} more" if more > 0 else "")

    def _tell_time(self) -> None:
        """After the first steps: how long the others will take."""
        summary, (steps, tokens, seconds) = self.summary, self._beginning
        done, left = summary.steps - steps, self.plan.steps - summary.steps
        if not self._has_told_time and done >= STEPS_TO_KNOW_SPEED and left > 0 and summary.seconds > seconds:
            self._has_told_time = True
            speed = (summary.tokens - tokens) / (summary.seconds - seconds)
            expected = expected_time(round((summary.tokens - tokens) / done * left), speed)
            self.say(f"expected time  {expected} for {left:,} more steps")

    def _is_due(self, step: int) -> bool:
        """Whether there is an evaluation after this step."""
        is_regular = self.options.eval_every > 0 and step % self.options.eval_every == 0
        return self.evaluation is not None and (is_regular or step in (0, self.plan.steps))

    def _evaluate_if_due(self) -> None:
        step, summary = self.summary.steps, self.summary
        if self.stop.signal is not None or not self._is_due(step) or step in summary.evaluations:
            return
        if step == self.plan.steps:
            save_adapter(self.model, self.options.out)  # whatever becomes of the evaluation
        began = time.perf_counter()
        assert self.evaluation is not None
        work = partial(
            evaluate,
            self.model,
            self.evaluation,
            self.options.batch,
            lambda: self.stop.signal is not None,
        )
        loss = relieved(self.optimizer, work, "evaluation")
        if loss is None:
            return  # a signal; a run that goes on from here evaluates first
        if not math.isfinite(loss):
            raise not_finite("evaluation loss", step, loss)
        summary.evaluations[step] = loss
        self.log.write(step=step, eval_loss=loss, eval_perplexity=perplexity_of(loss))
        self.sinks.write(step, {"eval_loss": loss, "eval_perplexity": perplexity_of(loss)})
        self.timing.write(step=step, eval_seconds=round(time.perf_counter() - began, 6))
        self.say(f"step {step}: evaluation loss {loss:.4f}, perplexity {perplexity_of(loss):.2f}")
        if self.options.eval_every and best_step(summary.evaluations) == step:
            save_adapter(self.model, self.options.best_path)

    def _save_checkpoint(self) -> None:
        summary = self.summary
        if self._saved_step == summary.steps and self.state.log == self.log.position():
            return
        self.state = replace(
            self.state,
            step=summary.steps,
            tokens=summary.tokens,
            seconds=summary.seconds,
            evaluations=dict(summary.evaluations),
            log=self.log.position(),
            timing=self.timing.position(),
            passes=self.model.passes.graphs.history(),
        )
        folder = self.options.checkpoints_path
        write_checkpoint(folder, self.model, self.optimizer, self.state)
        self._saved_step = summary.steps
        remove_old(folder, self.options.keep)
        self.say(f"step {summary.steps}: checkpoint {checkpoint_path(folder, summary.steps)}")
