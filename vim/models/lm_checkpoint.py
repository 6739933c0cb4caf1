"""Checkpoints of Mamba language models, from the authors or transformers: configuration, names and weights."""

import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vim.layers.rename import rename

# Names in the authors' checkpoints and in those of transformers -> ours. transformers writes "embeddings" for
# "embedding", and no "backbone." in front if the model has no head.
NATIVE_NAMES = {
    r"(?:backbone\.)?embeddings?\.(.*)": r"embedding.\1",
    r"(?:backbone\.)?norm_f\.(.*)": r"norm.\1",
    r"(?:backbone\.)?layers\.(\d+)\.norm\.(.*)": r"blocks.\1.norm.\2",
    r"(?:backbone\.)?layers\.(\d+)\.mixer\.(in_proj|out_proj)\.(.*)": r"blocks.\1.mixer.\2.\3",
    r"(?:backbone\.)?layers\.(\d+)\.mixer\.(.*)": r"blocks.\1.mixer.ssm.\2",
    r"lm_head\.(.*)": r"head.\1",
}
# Our names -> the authors'.
OFFICIAL_NAMES = {
    r"embedding\.(.*)": r"backbone.embedding.\1",
    r"norm\.(.*)": r"backbone.norm_f.\1",
    r"blocks\.(\d+)\.mixer\.(?:ssm\.)?(.*)": r"backbone.layers.\1.mixer.\2",
    r"blocks\.(.*)": r"backbone.layers.\1",
    r"head\.(.*)": r"lm_head.\1",
}
# Options without effect on a trained model: initial values, implementations, special tokens.
IGNORED = (
    *("fused_add_norm", "initializer_range", "rescale_prenorm_residual", "use_cache", "use_mambapy"),
    *("use_associative_scan", "time_step_scale", "time_step_min", "time_step_max", "time_step_init_scheme"),
    *("time_step_floor", "bos_token_id", "eos_token_id", "pad_token_id", "tokenizer_class", "pad_vocab_size_multiple"),
    *("architectures", "transformers_version", "_name_or_path", "torch_dtype", "dtype", "return_dict", "problem_type"),
    *("output_hidden_states", "output_attentions", "chunk_size_feed_forward", "is_encoder_decoder"),
    *("id2label", "label2id"),
)
IGNORED_SSM = ("dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "use_fast_path")
FILES = ("model.safetensors", "pytorch_model.bin")
EXPECTED = "config.json and model.safetensors or pytorch_model.bin, whole or in shards with their .index.json"


class Options:
    """The options of a config.json. Each is taken once; `unknown` names those that are left.

    Args: section: prefix of the names in messages.

    Raises: ValueError from the methods that take an option, if it is missing or has an invalid value.
    """

    def __init__(self, content: Mapping[str, Any], section: str = ""):
        self.left, self.section = dict(content), section

    def _take(self, name: str, default: Any, rule: str, fits: Callable[[Any], bool]) -> Any:
        value = self.left.pop(name, default)
        if not fits(value):
            raise ValueError(f"config.json has {self.section}{name} = {value!r}; {rule}")
        return value

    def size(self, name: str, default: int | None = None) -> int:
        """Required if there is no default."""
        if default is None and name not in self.left:
            raise ValueError(f"config.json has no {self.section}{name}; give that of a Mamba language model")
        return self._take(name, default, "it must be a whole number of at least 1", is_size)

    def number(self, name: str, default: float) -> float:
        return self._take(name, default, "it must be a number above 0", is_positive)

    def flag(self, name: str, default: bool) -> bool:
        return self._take(name, default, "it must be true or false", lambda value: isinstance(value, bool))

    def table(self, name: str) -> dict[str, Any]:
        """Empty if it is missing."""
        return self._take(name, {}, "it must be a table", lambda value: value is None or isinstance(value, dict)) or {}

    def rank(self, name: str) -> int | None:
        """dt_rank; None for the default."""
        rule = "it must be 'auto' or a whole number of at least 1"
        value = self._take(name, "auto", rule, lambda value: value == "auto" or is_size(value))
        return None if value == "auto" else value

    def only(self, name: str, *allowed: Any) -> None:
        """If given, the option must have one of these values."""
        rule = f"MambaLM (Mamba's first version) takes only {' or '.join(map(repr, allowed))}"
        self._take(name, allowed[0], rule, lambda value: value in allowed)

    def skip(self, names: Iterable[str]) -> None:
        for name in names:
            self.left.pop(name, None)

    @property
    def unknown(self) -> list[str]:
        return [self.section + name for name in self.left]


def is_size(value: Any) -> bool:
    return type(value) is int and value >= 1


def is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def arguments_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of MambaLM for the content of a config.json of the authors or of transformers.

    Unknown options of a transformers configuration only cause a warning: transformers itself ignores them.

    Raises: ValueError for a model that MambaLM cannot represent.
    """
    options = Options(config)
    if not {"hidden_size", "model_type"} & set(config):
        return _authors_arguments(options)
    arguments = _transformers_arguments(options)
    if options.unknown:
        warnings.warn(f"config.json has options that are ignored: {', '.join(options.unknown)}", stacklevel=2)
    return arguments


def _authors_arguments(options: Options) -> dict[str, Any]:
    options.only("d_intermediate", 0)
    options.only("attn_layer_idx", [])
    options.only("attn_cfg", {})
    ssm = Options(options.table("ssm_cfg"), "ssm_cfg.")
    ssm.only("layer", "Mamba1")
    ssm.skip(IGNORED_SSM)
    arguments = {
        "vocab_size": options.size("vocab_size"),
        "d_model": options.size("d_model"),
        "depth": options.size("n_layer"),
        "d_state": ssm.size("d_state", 16),
        "d_conv": ssm.size("d_conv", 4),
        "expand": ssm.number("expand", 2),
        "dt_rank": ssm.rank("dt_rank"),
        "bias": ssm.flag("bias", False),
        "conv_bias": ssm.flag("conv_bias", True),
        "rms_norm": options.flag("rms_norm", True),
        "norm_eps": options.number("norm_epsilon", 1e-5),  # ours; the authors' code refuses it and has only 1e-5
        "residual_in_fp32": options.flag("residual_in_fp32", True),
        "tie_embeddings": options.flag("tie_embeddings", True),
        "vocab_multiple": options.size("pad_vocab_size_multiple", 8),
    }
    options.skip(IGNORED)
    if unknown := options.unknown + ssm.unknown:
        raise ValueError(f"config.json has unknown options: {', '.join(unknown)}")
    return arguments


def _transformers_arguments(options: Options) -> dict[str, Any]:
    options.only("model_type", "mamba")
    options.only("hidden_act", "silu", "swish")
    options.only("quantization_config", None)
    d_model, depth, expand = options.size("hidden_size"), options.size("num_hidden_layers"), options.number("expand", 2)
    d_inner = options.size("intermediate_size", int(expand * d_model))
    if int(expand * d_model) != d_inner:  # transformers uses intermediate_size
        expand = d_inner / d_model
        if int(expand * d_model) != d_inner:  # the quotient was rounded down
            expand = math.nextafter(expand, math.inf)
    # Configurations converted from the authors' hold the authors' names, too.
    options.only("rms_norm", True)
    options.only("ssm_cfg", {}, None)
    options.only("d_model", d_model)
    options.only("d_inner", d_inner)
    options.only("n_layer", depth)
    arguments = {
        "vocab_size": options.size("vocab_size"),
        "d_model": d_model,
        "depth": depth,
        "d_state": options.size("state_size", 16),
        "d_conv": options.size("conv_kernel", 4),
        "expand": expand,
        "dt_rank": options.rank("time_step_rank"),
        "bias": options.flag("use_bias", False),
        "conv_bias": options.flag("use_conv_bias", True),
        "rms_norm": True,
        "norm_eps": options.number("layer_norm_epsilon", 1e-5),
        "residual_in_fp32": options.flag("residual_in_fp32", True),
        "tie_embeddings": options.flag("tie_word_embeddings", True),
        "vocab_multiple": 1,
    }
    options.skip(IGNORED)
    return arguments


def official_name(name: str) -> str:
    """The authors' name of one of our weights."""
    return rename(OFFICIAL_NAMES, name)


def native_weights(weights: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tied: bool) -> dict[str, Tensor]:
    """The weights of a checkpoint under our names: exactly those in `wanted`.

    Args: wanted: tensors of the right shapes. tied: head and embedding share weights, and the head's may be missing.

    Raises: ValueError, in one line, for weights that do not fit.
    """
    names: dict[str, str] = {}
    for name in weights:
        if (twice := names.setdefault(rename(NATIVE_NAMES, name), name)) != name:
            raise ValueError(f"{twice} and {name} are the same weight; leave one of them out")
    native = {ours: weights[name] for ours, name in names.items()}
    if tied and "embedding.weight" in native:
        native.setdefault("head.weight", native["embedding.weight"])
        if not torch.equal(native["head.weight"], native["embedding.weight"]):
            raise ValueError("the weights of head and embedding differ, but config.json says that they are tied")
    shapes = [
        f"{names[name]} {tuple(native[name].shape)} {native[name].dtype} for {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in names and (native[name].shape != tensor.shape or not native[name].is_floating_point())
    ]
    missing = [official_name(name) for name in wanted if name not in native]
    unexpected = [names[name] for name in native if name not in wanted]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape or dtype": shapes}
    if faults := [f"{len(found)} {kind} ({_first(found)})" for kind, found in kinds.items() if found]:
        raise ValueError(f"the weights do not fit config.json: {'; '.join(faults)}")
    return native


def _first(found: list[str]) -> str:
    return ", ".join(found[:3]) + (" ..." if len(found) > 3 else "")


def checkpoint_folder(source: str | Path) -> Path:
    """The folder of a checkpoint: `source` itself, or the download of a repository on the Hugging Face hub.

    Raises: FileNotFoundError, NotADirectoryError.
    """
    folder = Path(source).expanduser()
    if folder.is_file():
        raise NotADirectoryError(f"{source} is a file; give its folder, with {EXPECTED}")
    if folder.is_dir():
        return folder
    for name in FILES:
        stem, suffix = Path(name).stem, Path(name).suffix
        patterns = ["config.json", "tokenizer.json", name, f"{name}.index.json", f"{stem}-*-of-*{suffix}"]
        folder = from_hub(str(source), patterns, f"a folder with {EXPECTED}")
        if (folder / name).exists() or (folder / f"{name}.index.json").exists():
            break
    return folder


def from_hub(repository: str, patterns: list[str], instead: str) -> Path:
    """Download the files of a repository on the Hugging Face hub that match the patterns. Returns: their folder.

    Args: instead: for the message, what to give instead.

    Raises: FileNotFoundError.
    """
    from huggingface_hub import snapshot_download  # for a single file, hf_hub_download retries half a minute offline
    from huggingface_hub.errors import HFValidationError, HTTPError  # HTTPError of the client's HTTP library

    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except HFValidationError as error:  # not a valid name on the hub
        raise FileNotFoundError(f"there is no {repository}; give {instead}") from error
    except (OSError, HTTPError) as error:
        reason = str(error).partition("\n")[0]
        message = f"there is no {repository} here, and the hub does not have it ({reason}); give {instead}"
        raise FileNotFoundError(message) from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises: ValueError for other content. FileNotFoundError.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path.name} in {path.parent}; a language model needs {EXPECTED}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it must hold a table, got {type(content).__name__}")
    return content


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read all weights of a checkpoint, from one file or from shards.

    Raises: ValueError for damaged files, and files with other content. FileNotFoundError for missing files and shards.
    """
    for name in FILES:
        if (folder / name).exists():
            return _read_tensors(folder / name)
        if (index := folder / f"{name}.index.json").exists():
            return _read_shards(index)
    raise FileNotFoundError(f"there are no weights in {folder}; a language model needs {EXPECTED}")


def _read_shards(index: Path) -> dict[str, Tensor]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ValueError(f"{index} is damaged: weight_map must be a table of file names")
    files = sorted(set(places.values()))
    if outside := [file for file in files if Path(file).name != file]:
        raise ValueError(f"{index} names files of other folders: {_first(outside)}")
    if absent := [file for file in files if not (index.parent / file).is_file()]:
        raise FileNotFoundError(f"{len(absent)} of {len(files)} shards are missing in {index.parent}: {_first(absent)}")
    weights: dict[str, Tensor] = {}
    for file in files:
        held = _read_tensors(index.parent / file)
        if lost := sorted({name for name, place in places.items() if place == file} ^ set(held)):
            raise ValueError(f"{index.parent / file} does not hold the weights that {index.name} lists: {_first(lost)}")
        weights |= held
    return weights


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises almost any type for a damaged file
        raise ValueError(f"{path} is damaged, or holds more than weights") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{path} must hold only weights by name")
    return weights
