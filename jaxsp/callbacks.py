"""Callbacks that hand every step of a training on, to TensorBoard or to Weights & Biases.

    jaxsp.compress(..., callbacks=[jaxsp.callbacks.TensorBoard("logs")])

Each needs an extra: ``pip install "jaxsp[tensorboard]"`` or ``"jaxsp[wandb]"``.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxsp.errors import UserError
from jaxsp.files import as_path

if TYPE_CHECKING:
    from jaxsp.training.slots import Step


class TensorBoard:
    """Writes each prompt's metrics for TensorBoard, into a folder of its id.

    Args:
      directory: folder of the logs, as ``tensorboard --logdir`` takes it.

    Raises:
      UserError: tensorboardX is not installed.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = as_path(directory, "The folder")
        self._writer = _installed("tensorboardX", "tensorboard").SummaryWriter
        self._writers: dict[str, Any] = {}

    def __call__(self, step: Step) -> None:
        """Hears of a step."""
        if step.job not in self._writers:
            self._writers[step.job] = self._writer(str(self.directory / step.job))
        writer = self._writers[step.job]
        for name, value in step.metrics.items():
            writer.add_scalar(name, value, step.number)
        if "held_out_kl" in step.metrics:
            writer.flush()  # evaluations are few

    def on_end(self, job: str) -> None:
        """Hears that a training has ended."""
        if (writer := self._writers.pop(job, None)) is not None:
            writer.close()


class WandB:
    """Sends each prompt's metrics to Weights & Biases, as a run of its id.

    Args:
      project: name of the project there.
      **options: further ones of ``wandb.init``, as ``mode="offline"``.

    Raises:
      UserError: wandb is not installed.
    """

    def __init__(self, project: str = "jaxsp", **options: Any) -> None:
        self._wandb = _installed("wandb", "wandb")
        self._options = {"project": project, **options}
        self._runs: dict[str, Any] = {}

    def __call__(self, step: Step) -> None:
        """Hears of a step."""
        if step.job not in self._runs:
            given = {"name": step.job, "reinit": "create_new", **self._options}
            self._runs[step.job] = self._wandb.init(**given)
        self._runs[step.job].log(step.metrics, step=step.number)

    def on_end(self, job: str) -> None:
        """Hears that a training has ended."""
        if (run := self._runs.pop(job, None)) is not None:
            run.finish()


def _installed(module: str, extra: str) -> Any:
    """A package that an extra brings."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{module} is not installed; pip install 'jaxsp[{extra}]'.") from error
