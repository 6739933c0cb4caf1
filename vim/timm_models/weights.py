"""Load weights into a model: all of them, or an error that names the missing and the left-over tensors."""

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm.models import _builder
from torch import Tensor, nn

from vim.checkpoint import check_archive, load_weights, one_line, unsafe_or_foreign
from vim.console.errors import ConfigError, RunError

from .timm_model import LoadedWeights, TimmModel

# Keys under which training code stores weights in its checkpoints. EMA first, like timm's own loader.
CONTAINERS = (
    "state_dict_ema", "model_ema", "ema", "state_dict", "model", "model_state_dict", "module", "net", "network",
    "backbone", "weights",
)  # fmt: skip
# Prefixes that wrappers (DDP, torch.compile, Lightning, hand-written modules) add to every name.
PREFIXES = ("module", "_orig_mod", "model", "backbone", "net", "network")
FOLDER_WEIGHTS = "model.safetensors"
NAMED = 3  # at most, tensors named in a message


def unwrapped(state: Any, own: Iterable[str], source: str) -> dict[str, Tensor]:
    """The weights in a checkpoint, without containers and wrapper prefixes.

    Args:
        state: content of the file.
        own: tensor names of the model to load; a prefix that occurs there is no wrapper's.

    Raises: ConfigError for a checkpoint without weights.
    """
    content = state
    while isinstance(content, dict):
        inner = next((content[key] for key in CONTAINERS if isinstance(content.get(key), dict)), None)
        if inner is None:
            break
        content = inner
    named = content.items() if isinstance(content, dict) else ()
    weights = {key: value for key, value in named if isinstance(key, str) and isinstance(value, Tensor)}
    weights.pop("n_averaged", None)  # of torch's AveragedModel
    if not weights:
        found = f"only {_some(list(state))}" if isinstance(state, dict) and state else "nothing"
        raise ConfigError(f"{source} is no checkpoint: it holds no weights, {found}; give a file with a state dict")
    return _without_wrappers(weights, own)


def put(model: nn.Module, state: Any, source: str, name: str, remedy: str) -> LoadedWeights:
    """Load a checkpoint into a model. Every tensor must match.

    Args:
        source, name: of the checkpoint and of the model. remedy: for the message if the weights do not fit.

    Raises: ConfigError for weights that do not fit.
    """
    own = model.state_dict()
    weights = unwrapped(state, own, source)
    with _recorded_keys(model) as found:
        try:
            model.load_state_dict(weights, strict=False)
        except RunError:  # from a signal
            raise
        except RuntimeError as error:  # shapes
            raise unfit(source, name, found, _wrong_shapes(weights, own), len(own), remedy, error) from error
    if found.missing or found.unexpected:
        raise unfit(source, name, found, [], len(own), remedy)
    return LoadedWeights(source, len(own), len(own))


@dataclass
class _Found:
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    loaded: bool = False


class TimmLoading:
    """Replaces timm's load_pretrained while timm creates a model: it checks what timm only logs.

    Args:
        name: of the model.
        checkpoint: file of weights, or folder of shards; None: the model's released weights, or those of its folder.
        remedy: for the message if the weights do not fit.
    """

    def __init__(self, name: str, checkpoint: str | None, remedy: str):
        self.name, self.checkpoint, self.remedy = name, checkpoint, remedy
        self.loaded: LoadedWeights | None = None

    @contextmanager
    def in_place(self) -> Iterator[None]:
        # A model's filter converts its checkpoints. timm passes it to this function and stores it nowhere.
        original, log, level = _builder.load_pretrained, _builder._logger, _builder._logger.level
        self.original: Callable[..., None] = original
        _builder.load_pretrained = self  # type: ignore[assignment]
        log.setLevel(logging.ERROR)  # it would list the mismatches that are refused here
        try:
            yield
        finally:
            _builder.load_pretrained = original
            log.setLevel(level)

    def __call__(
        self,
        model: TimmModel,
        *,
        pretrained_cfg: dict[str, Any],
        num_classes: int,
        in_chans: int,
        filter_fn: Callable[..., dict] | None,
        strict: bool,
        **others: Any,
    ) -> None:
        """Like timm's load_pretrained. strict is False if the model is only the trunk of what was saved.

        Raises: ConfigError for weights that do not fit, or a file that cannot be read.
        """
        cfg = dict(pretrained_cfg)  # a copy: the model keeps the original
        source, file = self._locate(cfg)
        if self.checkpoint is not None:  # tells filters where the weights come from instead
            model.pretrained_cfg.update(source="", file=cfg["file"])
        own = model.state_dict()
        heads = _classifiers(cfg)
        head_names = {name for name in own if name.startswith(tuple(f"{head}." for head in heads))}
        classes = num_classes if head_names else 0  # a trunk has no head
        loaded = self.loaded = LoadedWeights(source)
        filtered: dict[str, Tensor] = {}

        def fit(state: dict, model: nn.Module) -> dict[str, Tensor]:
            if file:
                state = unwrapped(state, own, source)
            elif not any(isinstance(value, dict) for value in state.values()):
                state = _without_wrappers(state, own)
            filtered.update(self._filtered(filter_fn, state, model, source, own))
            if file:
                _describe(cfg, filtered, model, in_chans, heads)
            loaded.changes += _changes(cfg, filtered, model, in_chans, classes, heads)
            return dict(filtered)

        def may_miss() -> set[str]:  # cfg["num_classes"] is the file's only after _describe
            return head_names if num_classes != cfg["num_classes"] else set()

        with _recorded_keys(model) as found:
            try:
                self.original(
                    model,
                    pretrained_cfg=cfg,
                    num_classes=num_classes,
                    in_chans=in_chans,
                    filter_fn=fit,
                    strict=False,
                    **others,
                )
            except (ConfigError, RunError):  # RunError: from a signal, too
                raise
            except Exception as error:  # torch raises almost anything on a damaged file
                if filtered:
                    found.missing = [name for name in found.missing if name not in may_miss()]
                    shapes = _wrong_shapes(filtered, {name: own[name] for name in own if name not in may_miss()})
                    raise unfit(source, self.name, found, shapes, len(own), self.remedy, error) from error
                if file:
                    raise ConfigError(unreadable(source, error)) from error
                raise
        if not found.loaded:  # a few timm models read their released files with their own code
            return
        loaded.new_head = bool(may_miss()) and classes > 0
        found.missing = [name for name in found.missing if name not in may_miss()]
        found.unexpected = found.unexpected if strict else []
        if found.missing or found.unexpected:
            raise unfit(source, self.name, found, [], len(own), self.remedy)
        loaded.total = len(own) - (len(head_names) if num_classes == 0 else 0)
        loaded.loaded = loaded.total - (len(head_names) if loaded.new_head else 0)

    def _locate(self, cfg: dict[str, Any]) -> tuple[str, bool]:
        """Name of the source, and whether it is a local file. If it is, `cfg` then tells timm to read it."""
        folder = Path(cfg["file"]) if cfg.get("source") == "local-dir" else None
        if self.checkpoint is not None:
            path = Path(self.checkpoint)
        elif folder is not None and (folder / FOLDER_WEIGHTS).is_file():
            path = folder / FOLDER_WEIGHTS
        elif folder is not None:  # timm finds files of other names
            return str(folder), True
        elif cfg.get("source") == "hf-hub":
            return f"hf-hub:{cfg['hf_hub_id']}", False
        else:
            tag = f".{cfg['tag']}" if cfg.get("tag") else ""
            return f"released weights of {cfg.get('architecture', self.name)}{tag}", False
        # custom_load: for some models timm would expect the format of another framework.
        cfg.update(source="", custom_load=False, state_dict=None, file=None)
        if path.is_dir():
            cfg["state_dict"] = load_weights(_shards(path))
        else:
            check_archive(path)
            cfg["file"] = str(path)
        return str(path), True

    def _filtered(
        self,
        filter_fn: Callable[..., dict] | None,
        state: dict,
        model: nn.Module,
        source: str,
        own: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Convert a state dict with the model's filter.

        Raises: ConfigError if the filter fails.
        """
        if filter_fn is None:
            return state
        takes = inspect.signature(filter_fn).parameters
        try:
            return filter_fn(state, model) if len(takes) > 1 else filter_fn(state)
        except RunError:  # from a signal
            raise
        except ValueError as error:  # the filter's own message
            raise ConfigError(f"{source} does not fit {self.name}: {one_line(error)}") from error
        except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
            # Filters crash on layouts that they do not know.
            found = _Found([name for name in own if name not in state], [name for name in state if name not in own])
            raise unfit(source, self.name, found, [], len(own), self.remedy, error) from error


def unfit(
    source: str,
    name: str,
    found: _Found,
    shapes: list[str],
    tensors: int,
    remedy: str,
    error: Exception | None = None,
) -> ConfigError:
    """The error for weights that do not fit a model of `tensors` tensors."""
    parts = []
    if found.missing:
        parts.append(f"{len(found.missing)} of {tensors} tensors are missing ({_some(found.missing)})")
    if found.unexpected:
        parts.append(f"{len(found.unexpected)} are left over ({_some(found.unexpected)})")
    if shapes:
        parts.append(f"{len(shapes)} have another shape ({_some(shapes)})")
    why = ", ".join(parts) or one_line(error)
    return ConfigError(f"{source} does not fit {name}: {why}; {remedy}")


def unreadable(path: str, error: Exception) -> str:
    """The message for a file that cannot be read as weights."""
    if Path(path).is_dir():
        return f"no weights in {path}: {one_line(error)}"
    if unsafe_or_foreign(error):
        return (
            f"cannot load {path}: it is no checkpoint, or holds objects besides tensors, numbers and text, which "
            "could run code; save its state dict alone"
        )
    return f"cannot load {path}: it is damaged, or no checkpoint ({one_line(error)})"


def check_file(path: Path) -> None:
    """Raise ConfigError unless the path is a file or a folder of shards."""
    if not path.exists():
        raise ConfigError(f"no file {path} to load weights from")
    if path.is_dir():
        _shards(path)


def _shards(path: Path) -> Path:
    if any(path.glob("shard-*-of-*.pt")):
        return path
    inside = [name for name in (FOLDER_WEIGHTS, "checkpoints/best.pt", "checkpoints/last.pt") if (path / name).exists()]
    give = f"give the file {path / inside[0]}" if inside else "give a file"
    raise ConfigError(f"{path} is a folder, not a file of weights; {give}")


@contextmanager
def _recorded_keys(model: nn.Module) -> Iterator[_Found]:
    """Record the missing and unexpected keys of load_state_dict, after all renaming by the modules' hooks."""
    found = _Found()

    def note(_: nn.Module, keys: Any) -> None:
        found.missing, found.unexpected, found.loaded = list(keys.missing_keys), list(keys.unexpected_keys), True

    handle = model.register_load_state_dict_post_hook(note)
    try:
        yield found
    finally:
        handle.remove()


def _without_wrappers(weights: dict[str, Tensor], own: Iterable[str]) -> dict[str, Tensor]:
    names = list(own)
    while True:
        prefix = next(iter(weights), "").partition(".")[0] + "."
        wraps = prefix[:-1] in PREFIXES and all(key.startswith(prefix) for key in weights)
        if not wraps or any(name.startswith(prefix) for name in names):
            return weights
        weights = {key.removeprefix(prefix): value for key, value in weights.items()}


def _classifiers(cfg: dict[str, Any]) -> tuple[str, ...]:
    """Names of the classifier modules; distilled models have two."""
    names = cfg.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _convolutions(cfg: dict[str, Any]) -> tuple[str, ...]:
    names = cfg.get("first_conv") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _describe(
    cfg: dict[str, Any], weights: dict[str, Tensor], model: nn.Module, in_chans: int, heads: tuple[str, ...]
) -> None:
    """Put the file's number of classes and channels into `cfg`; timm would assume those of the released weights."""
    rows = next((len(weights[f"{head}.weight"]) for head in heads if f"{head}.weight" in weights), 0)
    offset = cfg.get("label_offset") or 0
    cfg["label_offset"] = offset if rows == cfg["num_classes"] + offset else 0
    cfg["num_classes"] = rows - cfg["label_offset"]
    for name in _convolutions(cfg):
        weight, conv = weights.get(f"{name}.weight"), model.get_submodule(name)
        if weight is None or not isinstance(conv, nn.Conv2d) or weight.ndim != 4:
            continue
        channels, rest = divmod(weight.shape[1] * conv.groups * in_chans, conv.in_channels)
        if rest == 0:
            cfg["input_size"] = (channels, *cfg["input_size"][1:])


def _changes(
    cfg: dict[str, Any],
    weights: dict[str, Tensor],
    model: nn.Module,
    in_chans: int,
    num_classes: int,
    heads: tuple[str, ...],
) -> list[str]:
    """Describe what timm will adapt."""
    changes = []
    if heads and num_classes not in (0, cfg["num_classes"]):
        changes.append(f"new: {', '.join(heads)} {cfg['num_classes'] or 'none'} -> {num_classes}")
    for name in _convolutions(cfg):
        weight, channels = weights.get(f"{name}.weight"), cfg["input_size"][0]
        if weight is not None and channels != in_chans and weight.shape != model.get_submodule(name).weight.shape:
            changes.append(f"adapted: {name} {channels} -> {in_chans} channels")
    return changes


def _wrong_shapes(weights: dict[str, Tensor], own: dict[str, Tensor]) -> list[str]:
    both = ((name, tuple(weights[name].shape), tuple(own[name].shape)) for name in own if name in weights)
    return [f"{name} {shape} for {wanted}" for name, shape, wanted in both if shape != wanted]


def _some(names: list[Any]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(map(str, names[:NAMED])) + more
