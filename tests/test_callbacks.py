"""Steps handed on: what TensorBoard's and Weights & Biases' own clients are called with."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

import jaxsp
from jaxsp.callbacks import TensorBoard, WandB
from jaxsp.training.slots import Step


def steps(job: str) -> list[Step]:
    metrics = [{"held_out_kl": 0.5}, {"loss": 1.0}, {"loss": 0.5, "held_out_kl": 0.25}]
    return [Step(job, number, 2, own, lambda: None) for number, own in enumerate(metrics)]


class Recorder:
    """A client that notes what it is called with."""

    def __init__(self, *given: Any, **options: Any) -> None:
        self.given, self.options = given, options
        self.calls: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *given, **options: self.calls.append((name, (*given, *options.items())))


@pytest.fixture
def recorders(monkeypatch) -> list[Recorder]:
    """The clients made by packages that take the place of the two."""
    made: list[Recorder] = []

    def make(*given: Any, **options: Any) -> Recorder:
        made.append(Recorder(*given, **options))
        return made[-1]

    for name, maker in (("tensorboardX", "SummaryWriter"), ("wandb", "init")):
        module = ModuleType(name)
        setattr(module, maker, make)
        monkeypatch.setitem(sys.modules, name, module)
    return made


def test_tensorboard_has_a_folder_a_prompt(recorders, tmp_path):
    callback = TensorBoard(tmp_path)
    for first, second in zip(steps("a"), steps("b"), strict=True):
        assert callback(first) is callback(second) is None
    assert [one.given for one in recorders] == [(str(tmp_path / "a"),), (str(tmp_path / "b"),)]
    assert recorders[0].calls == [
        ("add_scalar", ("held_out_kl", 0.5, 0)), ("flush", ()), ("add_scalar", ("loss", 1.0, 1)),
        ("add_scalar", ("loss", 0.5, 2)), ("add_scalar", ("held_out_kl", 0.25, 2)), ("flush", ()),
        ("close", ()),
    ]  # fmt: skip


def test_weights_and_biases_have_a_run_a_prompt(recorders):
    callback = WandB("mine", mode="offline")
    for first, second in zip(steps("a"), steps("b"), strict=True):
        assert callback(first) is callback(second) is None
    expected = {"project": "mine", "mode": "offline", "reinit": "create_new"}
    assert [one.options for one in recorders] == [{**expected, "name": name} for name in "ab"]
    assert recorders[1].calls == [
        ("log", ({"held_out_kl": 0.5}, ("step", 0))), ("log", ({"loss": 1.0}, ("step", 1))),
        ("log", ({"loss": 0.5, "held_out_kl": 0.25}, ("step", 2))), ("finish", ()),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "module", "extra"),
    [(lambda: TensorBoard("logs"), "tensorboardX", "tensorboard"), (WandB, "wandb", "wandb")],
)
def test_what_is_not_installed_is_a_sentence(make, module, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(jaxsp.UserError, match=rf"{module} is not installed; pip install 'jaxsp\[{extra}\]'"):
        make()


def test_a_folder_must_be_a_path():
    with pytest.raises(jaxsp.UserError, match="The folder must be a path"):
        jaxsp.callbacks.TensorBoard("")
