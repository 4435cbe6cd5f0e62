"""Steps handed on: what TensorBoard's and Weights & Biases' own clients are called with."""

from __future__ import annotations

import contextlib
import sys
from types import ModuleType
from typing import Any

import pytest

import jaxsp
from jaxsp.callbacks import TensorBoard, WandB
from jaxsp.training.slots import Step
from jaxsp.typing import Interrupted
from tests.training.test_loop import CountingDriver, block, job


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
    callback.on_end("a")
    callback.on_end("b")
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
    callback.on_end("a")
    callback.on_end("b")
    expected = {"project": "mine", "mode": "offline", "reinit": "create_new"}
    assert [one.options for one in recorders] == [{**expected, "name": name} for name in "ab"]
    assert recorders[1].calls == [
        ("log", ({"held_out_kl": 0.5}, ("step", 0))), ("log", ({"loss": 1.0}, ("step", 1))),
        ("log", ({"loss": 0.5, "held_out_kl": 0.25}, ("step", 2))), ("finish", ()),
    ]  # fmt: skip


HEARD = {TensorBoard: "close", WandB: "finish"}
"""The call that ends a run of each client."""


RAISED = {"error": (RuntimeError, "no"), "Ctrl-C": (Interrupted, "after step 4 of 8")}


def stop(step: Step) -> bool:
    return step.number == 2


@pytest.mark.parametrize("way", ["last step", "patience", "callback", "not finite", "error", "Ctrl-C"])
@pytest.mark.parametrize("kind", HEARD)
def test_a_run_ends_with_its_training(recorders, tmp_path, kind, way):
    """However it ends; a second training of the same id is a run of its own."""
    callback = kind(tmp_path)
    losses = {"not finite": float("nan"), "error": RuntimeError("no"), "Ctrl-C": KeyboardInterrupt()}
    given = {5: losses[way]} if way in losses else {}
    for _ in range(2):
        own = job(8, "mine", patience=2 if way == "patience" else 0)
        callbacks = [callback, *([stop] if way == "callback" else [])]
        training = block([own], CountingDriver(given), callbacks=callbacks)
        with (
            pytest.raises(raised[0], match=raised[1])
            if (raised := RAISED.get(way))
            else contextlib.nullcontext()
        ):
            assert [result.id for result in training.run()] == ["mine"]
    assert len(recorders) == 2
    for one in recorders:
        assert [call for call in one.calls if call[0] == HEARD[kind]] == [(HEARD[kind], ())]
        assert one.calls[-1][0] == HEARD[kind]
    ends = {"last step": 8, "patience": 2, "callback": 2}
    steps = [dict(call[1][1:]).get("step") for call in recorders[1].calls if call[0] == "log"]
    if kind is WandB:
        assert steps == [*range(ends.get(way, 4) + 1)]
    callback.on_end("mine")  # there is none: nothing happens


def test_one_that_trains_beside_others_ends_when_it_ends(recorders):
    callback, ended = WandB(), []

    def watch(step: Step) -> None:
        ended.append([("finish", ()) in one.calls for one in recorders])

    jobs = [job(2, "short"), job(4, "long")]
    assert len(list(block(jobs, slots=2, callbacks=[callback, watch]).run())) == 2
    assert ended[-1] == [True, False]


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
