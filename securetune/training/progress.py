"""What a person sees while a model trains: loss, tokens per second and the epsilon spent."""

import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from securetune.training.loop import StepResult


class _Bar:
    """A live bar on a terminal; elsewhere none, and its users print lines."""

    def __init__(self, *columns: ProgressColumn) -> None:
        self._console = Console()
        self._bar: Progress | None = None
        if sys.stdout.isatty():
            shown = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *columns)
            self._bar = Progress(*shown, TimeRemainingColumn(), console=self._console)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


class TrainingProgress(_Bar):
    """A progress bar on a terminal, one line per step elsewhere.

    Args:
        title: What is trained.
        total: Planned steps.
        done: Steps already done, in a resumed run.
    """

    def __init__(self, title: str, *, total: int, done: int = 0) -> None:
        super().__init__(TextColumn("{task.fields[numbers]}"))
        self._title = title
        self._total = total
        self._task: TaskID | None = None
        if self._bar is not None:
            self._task = self._bar.add_task(title, total=total, completed=done, numbers="")

    def update(self, result: StepResult, *, epsilon: float | None) -> None:
        """Show a finished step.

        Args:
            result: The step.
            epsilon: Epsilon spent so far; None without privacy.
        """
        loss = "loss -" if result.loss is None else f"loss {result.loss:.3f}"
        spent = "no privacy" if epsilon is None else f"epsilon {epsilon:.2f}"
        numbers = f"{loss}  {result.num_tokens / max(result.seconds, 1e-9):,.0f} tokens/s  {spent}"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=1, numbers=numbers)
        else:
            self._console.print(
                f"{self._title}  step {result.step}/{self._total}  {numbers}", highlight=False
            )


class StageProgress(_Bar):
    """What a person sees while a model is measured: a bar on a terminal, one line per stage elsewhere.

    Args:
        subject: Which model.
    """

    def __init__(self, subject: str) -> None:
        super().__init__()
        self._subject = subject
        self._tasks: dict[str, TaskID] = {}
        self._finished: set[str] = set()

    def update(self, stage: str, done: int, total: int) -> None:
        """Show how far a stage is.

        Args:
            stage: Its name.
            done: Texts done.
            total: Texts in the stage.
        """
        title = f"evaluate {self._subject}: {stage}"
        if self._bar is not None:
            if stage not in self._tasks:
                self._tasks[stage] = self._bar.add_task(title, total=total)
            self._bar.update(self._tasks[stage], completed=done, total=total)
        elif done == total and stage not in self._finished:
            self._finished.add(stage)
            self._console.print(f"{title} done", highlight=False)
