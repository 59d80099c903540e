"""Where a training run says how it goes: `log.jsonl`, TensorBoard, and the screen."""

import json
import sys
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter


class Step(NamedTuple):
    """One optimiser step, counted from 1. `loss` is the mean over learned tokens before the step.

    `tokens` without padding, visual ones included; `data_wait_s` of `step_s` went by waiting for images.
    """

    step: int
    loss: float
    learning_rate: float
    tokens: int
    samples: int
    data_wait_s: float
    step_s: float


class TrainingLog:
    """Every step goes to `log.jsonl` and TensorBoard. On a terminal a progress bar, elsewhere one line per `log_every` steps."""

    def __init__(self, folder: Path, max_steps: int, log_every: int) -> None:
        self._folder, self._max_steps, self._log_every = folder, max_steps, log_every
        self.losses: list[float] = []

    def __enter__(self) -> Self:
        self._lines = (self._folder / "log.jsonl").open("w")
        self._board = SummaryWriter(self._folder / "tensorboard")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, disable=not sys.stdout.isatty())
        self._task = self._progress.add_task("training", total=self._max_steps)
        self._progress.start()
        return self

    def write(self, step: Step) -> None:
        self.losses.append(step.loss)
        self._lines.write(json.dumps(step._asdict()) + "\n")
        self._lines.flush()
        for name in ("loss", "learning_rate", "data_wait_s", "step_s"):
            self._board.add_scalar(f"train/{name}", getattr(step, name), step.step)
        if sys.stdout.isatty():
            self._progress.update(self._task, advance=1, description=f"loss {step.loss:.4f}")
        elif step.step % self._log_every == 0 or step.step in (1, self._max_steps):
            print(
                f"step {step.step}/{self._max_steps}  loss {step.loss:.4f}  learning rate {step.learning_rate:.2e}  "
                f"{step.step_s:.2f} s, {step.data_wait_s:.2f} s of it waiting for data",
                flush=True,
            )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        self._board.close()
        self._lines.close()


def ends(losses: list[float]) -> tuple[float, float]:
    """Mean loss of the first three and of the last three steps."""
    first, last = losses[:3], losses[-3:]
    return sum(first) / len(first), sum(last) / len(last)
