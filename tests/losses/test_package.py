"""`from jaxsp import losses` is light, whole and documented."""

from __future__ import annotations

import inspect

from jaxsp import losses


def test_importing_losses_loads_only_jax_numpy_chex_and_what_they_load(python):
    code = (
        "import sys, jax, jax.numpy, numpy, chex; before = set(sys.modules); import jaxsp.losses;"
        "standard = set(sys.stdlib_module_names);"
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before} - standard))"
    )
    assert python("-c", code).stdout.strip() == "['jaxsp']"
    code = "import sys, jaxsp.losses; print('flax' in sys.modules, 'transformers' in sys.modules)"
    assert python("-c", code).stdout.strip() == "False False"


def test_annotations_can_be_read_with_jax_alone(python):
    code = (
        "import inspect, sys, typing; from jaxsp import losses;"
        "public = [getattr(losses, name) for name in losses.__all__];"
        "found = [typing.get_type_hints(f, include_extras=True) for f in public if inspect.isfunction(f)];"
        "print([hints['return'] for hints in found], 'jaxtyping' in sys.modules)"
    )
    done = python("-c", code)
    assert done.stdout.count("Float, '*b t'") >= 10, done.stderr
    assert done.stdout.endswith("False\n")


def test_every_public_function_is_documented_in_order():
    """One line, the maths, Args, Returns, Raises, Example, Reference."""
    for name in losses.__all__:
        thing = getattr(losses, name)
        if not inspect.isfunction(thing) or name in ("merge", "masked_mean", "masked_sum", "top_k"):
            continue
        text = inspect.getdoc(thing) or ""
        parts = ["Args:", "Returns:", "Raises:", "Example:", ">>>", "Reference:"]
        if name in ("parse", "as_objective"):
            parts = ["Args:", "Returns:", "Raises:", "Example:", ">>>"]
        places = [text.index(part) for part in parts]
        assert places == sorted(places), name
        assert text.split("\n")[0].endswith((".", "?", "y.")), name
        if name not in ("parse", "as_objective", "fused_objective"):
            assert ".. math::" in text or ":math:" in text, name
