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
    assert done.stdout.count("Float, '*t'") >= 10, done.stderr
    assert done.stdout.endswith("False\n")


def test_every_public_function_is_documented_in_order():
    """One line, the maths, Args, Returns, Raises, Example, Reference."""
    for name in losses.__all__:
        thing = getattr(losses, name)
        if not inspect.isfunction(thing) or name in ("merge", "masked_mean", "masked_sum", "topk"):
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


def test_jax_is_all_that_the_losses_need(python):
    """With every other package that jaxsp depends on refused: they are imported, trained on and shown."""
    code = """
import sys

class Refused:
    def find_spec(self, name, path=None, target=None):
        allowed = {"jax", "jaxlib", "numpy", "scipy", "ml_dtypes", "opt_einsum", "jaxsp", "libtpu"}
        if name.partition(".")[0] in refused - allowed:
            raise ImportError(f"{name} is refused")

import importlib.metadata, re
refused = {"absl", "beartype", "chex", "flax", "jaxtyping", "optax", "orbax", "transformers"}
refused |= {re.split(r"[^\\w-]", text)[0].replace("-", "_") for text in importlib.metadata.requires("jaxsp")}
sys.meta_path.insert(0, Refused())
import jax, jax.numpy as jnp
from jaxsp import losses

x, head = jax.random.normal(jax.random.key(0), (2, 3, 4)), jax.random.normal(jax.random.key(1), (5, 4))
values, gradient = jax.value_and_grad(
    lambda y: losses.masked_mean(losses.fused_objective("kl=0.5,topk_js", y, head, teacher_hidden=x)[0])
)(2 * x)
loaded = (refused - {"jax"}) & sys.modules.keys()
print(gradient.shape, len(str(losses.OBJECTIVES).splitlines()) > 20, sorted(loaded))
"""
    done = python("-c", code)
    assert done.stdout.strip() == "(2, 3, 4) True []", done.stderr
