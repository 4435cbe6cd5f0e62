"""Settings: read by name, checked, and the keys that are derived from their parts."""

from __future__ import annotations

import dataclasses
import re
import typing

import optax
import pytest

from jaxsp import settings as module
from jaxsp.losses import OBJECTIVES
from jaxsp.prompts import PROMPT_KINDS
from jaxsp.prompts.initializers import INITIALIZERS
from jaxsp.settings import Options, Settings, decides_result, make_settings, plain, side_by_side
from jaxsp.teacher import problem
from jaxsp.training.drivers import DRIVERS
from jaxsp.training.optimizers import OPTIMIZERS
from jaxsp.typing import UserError

PARTS = [part.name for part in dataclasses.fields(Settings)]


def test_options_are_the_fields_of_all_parts():
    """An editor completes what there is."""
    assert list(typing.get_type_hints(Options)) == list(plain(Settings()))


@pytest.mark.parametrize(
    ("command", "option", "table"),
    [
        ("compress", "objective", [name for name, entry in OBJECTIVES.items() if entry.differentiable]),
        ("compress", "optimizer", OPTIMIZERS),
        ("compress-many", "initial", INITIALIZERS),
        ("compress-many", "kind", PROMPT_KINDS),
        ("plan", "parallel", DRIVERS),
    ],
)
def test_the_help_lists_the_choices(jaxsp_command, command, option, table):
    code, out, _ = jaxsp_command(command, "--help")
    assert code == 0
    entry = out.partition(f"--{option} ")[2].partition("(default:")[0]
    assert set(table) <= set(re.findall(r"\w+", entry))


def test_values_find_their_part():
    found = make_settings({"prompt_length": 3, "steps": 7, "mesh": "data=2", "max_answer_tokens": 5})
    assert (found.prompt.prompt_length, found.training.steps) == (3, 7)
    assert (found.devices.mesh, found.teacher.max_answer_tokens) == ("data=2", 5)
    assert make_settings({"seed": 1}, base=found).prompt.prompt_length == 3
    assert make_settings({"learning_rate": 1}).training.learning_rate == 1.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"colour": 1}, "Unknown setting 'colour'; the settings are prompt_length, "),
        ({"step": 1}, r"Unknown setting 'step'; did you mean steps\?$"),
        ({"length": 1}, "Unknown setting 'length'; it is called prompt_length now."),
        ({"clip": 1}, "Unknown setting 'clip'; it is called max_grad_norm now."),
        ({"steps": "many"}, "--steps must be a whole number, not 'many'"),
        ({"steps": True}, "--steps must be a whole number, not True"),
        ({"objective": 3}, "--objective must be a text, not 3"),
        ({"prompt_length": 10**9}, "--prompt-length must be at most 1048576, not 1000000000"),
        ({"batch_size": 10**19}, "--batch-size must be at most 1048576, not 10000000000000000000"),
        ({"prompt_length": 0}, "--prompt-length must be at least 1, not 0"),
        ({"learning_rate": 0.0}, "--learning-rate must be above 0, not 0.0"),
        ({"warmup_fraction": 1.0}, "--warmup-fraction must be at least 0 and below 1, not 1.0"),
        ({"max_grad_norm": float("nan")}, "--max-grad-norm must be a finite number, not nan"),
        ({"weight_decay": -1.0}, "--weight-decay must be at least 0, not -1.0"),
        ({"seed": 2**32}, "--seed must be at least 0 and below 4294967296, not 4294967296"),
    ],
)
def test_refusals(values, message):
    with pytest.raises(UserError, match=message):
        make_settings(values)


def test_objects_of_the_users_own_are_told_apart_as_texts():
    own = make_settings({"objective": OBJECTIVES["js"], "optimizer": optax.adamw(0.1)})
    summary = plain(own)
    assert summary["objective"] == "js"
    assert "GradientTransformation" in summary["optimizer"]
    assert "0x" not in summary["optimizer"]
    assert plain(make_settings({"optimizer": optax.adamw(0.1)}))["optimizer"] == summary["optimizer"]


def with_new_field(part: str, value: int, *, per_prompt: bool = False) -> Settings:
    """Settings of which a part has one field more."""
    base = Settings()
    field = dataclasses.field(default=0, metadata={"per_prompt": per_prompt})
    larger = dataclasses.make_dataclass(
        "Larger", [("brand_new", int, field)], bases=(type(getattr(base, part)),), frozen=True
    )
    return dataclasses.replace(base, **{part: larger(brand_new=value)})


@pytest.mark.parametrize("part", PARTS)
def test_a_new_setting_is_forgotten_by_no_key(part, calm_model):
    """Whatever is kept for reuse is kept apart for each value of it, and for nothing else."""
    from jaxsp.data.documents import Query
    from jaxsp.runs.problems import bracket_key
    from jaxsp.study import study_key
    from tests.conftest import CONTEXT

    def keys(value, **options):
        settings = with_new_field(part, value, **options)
        job = problem.tokenize(calm_model, CONTEXT, [Query("a?")], [Query("b?")], settings)
        sigma = {"embeddings": calm_model.embed(job.context_ids[:4])}
        return {
            "study": study_key(calm_model, CONTEXT, [], [], settings),
            "teacher": problem.teacher_key(calm_model, job, settings.teacher),
            "brackets": bracket_key(calm_model, job, settings, sigma),
            "run": decides_result(settings),
            "side by side": side_by_side(settings),
        }

    changed = {
        "prompt": {"brackets", "run", "side by side"},
        "study": {"study", "run"},
        "teacher": {"study", "teacher", "brackets", "run"},
        "training": {"run", "side by side"},
        "devices": {"side by side"},
    }
    before, after = keys(0), keys(1)
    assert {name for name in before if before[name] != after[name]} == changed[part]
    before, after = (keys(value, per_prompt=True) for value in (0, 1))
    different = {name for name in before if before[name] != after[name]}
    assert different == changed[part] - {"side by side"}


def test_brackets_are_those_of_the_queries_held_out(calm_model):
    from jaxsp.data.documents import Query
    from jaxsp.runs.problems import bracket_key
    from tests.conftest import CONTEXT

    settings, a, b, c = Settings(), Query("a?"), Query("b?"), Query("c?")
    first, second = (
        problem.tokenize(calm_model, CONTEXT, train, held_out, settings)
        for train, held_out in (([a, b], [c]), ([a], [b, c]))
    )
    sigma = {"embeddings": calm_model.embed(first.context_ids[:4])}
    teachers = [problem.teacher_key(calm_model, job, settings.teacher) for job in (first, second)]
    assert teachers[0] == teachers[1]
    assert bracket_key(calm_model, first, settings, sigma) != bracket_key(calm_model, second, settings, sigma)


def test_every_part_says_what_its_fields_are():
    for part in PARTS:
        kind = type(getattr(Settings(), part))
        assert kind.__doc__, kind
        assert kind.__module__ == module.__name__
