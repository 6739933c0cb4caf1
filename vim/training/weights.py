"""Weights from wherever they lie into a model: all of them, or one line that says which are missing or left over."""

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm.models import _builder
from torch import Tensor, nn

from .checkpoint import check_archive, load_weights, one_line, unsafe_or_foreign
from .errors import ConfigError, RunError

# Under which keys training code keeps weights in its checkpoints; averaged ones first, as timm's own loader has it.
CONTAINERS = (
    "state_dict_ema", "model_ema", "ema", "state_dict", "model", "model_state_dict", "module", "net", "network",
    "backbone", "weights",
)  # fmt: skip
# What wrappers (DDP, torch.compile, Lightning, hand-written modules) put before every name.
PREFIXES = ("module", "_orig_mod", "model", "backbone", "net", "network")
FOLDER_WEIGHTS = "model.safetensors"
NAMED = 3  # names of tensors in a message


@dataclass
class Arrived:
    """What came of loading: `arrived` of `tensors` in the model are from `source`.

    changes: what was made to fit: "new: head 10 -> 2".
    """

    source: str
    arrived: int = 0
    tensors: int = 0
    changes: list[str] = field(default_factory=list)
    new_head: bool = False

    def __str__(self) -> str:
        counted = [f"{self.arrived} of {self.tensors} tensors"] if self.tensors else []
        return f"{self.source} ({'; '.join(counted + self.changes)})" if counted or self.changes else self.source


def unwrapped(state: Any, own: Iterable[str], source: str) -> dict[str, Tensor]:
    """The weights in a checkpoint, under their names in the model that was trained.

    Args:
        state: content of a file.
        own: names in the model that they are for; a prefix that those have is no wrapper.

    Raises: ConfigError for one without weights.
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


def put(model: nn.Module, state: Any, source: str, name: str, remedy: str) -> Arrived:
    """Put the weights of a checkpoint into a model: every one of them, and no others.

    Args:
        source, name: of the checkpoint and of the model. remedy: what to do if they do not fit.

    Raises: ConfigError for weights that do not fit.
    """
    own = model.state_dict()
    weights = unwrapped(state, own, source)
    with _noting(model) as found:
        try:
            model.load_state_dict(weights, strict=False)
        except RunError:  # of a signal
            raise
        except RuntimeError as error:  # shapes
            raise unfit(source, name, found, _other_shapes(weights, own), len(own), remedy, error) from error
    if found.missing or found.unexpected:
        raise unfit(source, name, found, [], len(own), remedy)
    return Arrived(source, len(own), len(own))


@dataclass
class _Found:
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    loaded: bool = False


class TimmLoading:
    """Takes the place of timm's load_pretrained while timm creates a model: it checks what timm would only log.

    Args:
        name: of the model. checkpoint: file, or folder of shards, of the weights; None for the model's own, which are
            its released ones or those of its folder.
        remedy: what to do if they do not fit.
    """

    def __init__(self, name: str, checkpoint: str | None, remedy: str):
        self.name, self.checkpoint, self.remedy = name, checkpoint, remedy
        self.arrived: Arrived | None = None

    @contextmanager
    def in_place(self) -> Iterator[None]:
        # timm hands a model's filter, which knows the layouts of its checkpoints, to this one function and keeps it
        # nowhere.
        original, log, level = _builder.load_pretrained, _builder._logger, _builder._logger.level
        self.original: Callable[..., None] = original
        _builder.load_pretrained = self  # type: ignore[assignment]
        log.setLevel(logging.ERROR)  # it would list what is refused here
        try:
            yield
        finally:
            _builder.load_pretrained = original
            log.setLevel(level)

    def __call__(
        self,
        model: nn.Module,
        *,
        pretrained_cfg: dict[str, Any],
        num_classes: int,
        in_chans: int,
        filter_fn: Callable[..., dict] | None,
        strict: bool,
        **others: Any,
    ) -> None:
        """As timm's, whose arguments these are; strict is False where the model is only a trunk of what is saved.

        Raises: ConfigError for weights that do not fit, or a file that cannot be read.
        """
        cfg = dict(pretrained_cfg)  # the model keeps the one that was given
        source, file = self._locate(cfg)
        if self.checkpoint is not None:  # a model's filter looks there for the origin of the weights
            model.pretrained_cfg.update(source="", file=cfg["file"])  # type: ignore[operator, union-attr]
        own = model.state_dict()
        heads = _classifiers(cfg)
        head_names = {name for name in own if name.startswith(tuple(f"{head}." for head in heads))}
        classes = num_classes if head_names else 0  # a trunk has no head
        arrived = self.arrived = Arrived(source)
        filtered: dict[str, Tensor] = {}

        def fit(state: dict, model: nn.Module) -> dict[str, Tensor]:
            if file:
                state = unwrapped(state, own, source)
            elif not any(isinstance(value, dict) for value in state.values()):
                state = _without_wrappers(state, own)
            filtered.update(self._filtered(filter_fn, state, model, source, own))
            if file:
                _describe(cfg, filtered, model, in_chans, heads)
            arrived.changes += _changes(cfg, filtered, model, in_chans, classes, heads)
            return dict(filtered)

        def spared() -> set[str]:  # once timm knows the classes of the file
            return head_names if num_classes != cfg["num_classes"] else set()

        with _noting(model) as found:
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
            except (ConfigError, RunError):  # the latter of a signal, too
                raise
            except Exception as error:  # torch raises almost anything on a damaged file
                if filtered:
                    found.missing = [name for name in found.missing if name not in spared()]
                    shapes = _other_shapes(filtered, {name: own[name] for name in own if name not in spared()})
                    raise unfit(source, self.name, found, shapes, len(own), self.remedy, error) from error
                if file:
                    raise ConfigError(unreadable(source, error)) from error
                raise
        if not found.loaded:  # timm reads a few models' released files by code of their own
            return
        arrived.new_head = bool(spared()) and classes > 0
        found.missing = [name for name in found.missing if name not in spared()]
        found.unexpected = found.unexpected if strict else []
        if found.missing or found.unexpected:
            raise unfit(source, self.name, found, [], len(own), self.remedy)
        arrived.tensors = len(own) - (len(head_names) if num_classes == 0 else 0)
        arrived.arrived = arrived.tensors - (len(head_names) if arrived.new_head else 0)

    def _locate(self, cfg: dict[str, Any]) -> tuple[str, bool]:
        """What to call the source, and whether it is a file here; then timm is told to read that."""
        folder = Path(cfg["file"]) if cfg.get("source") == "local-dir" else None
        if self.checkpoint is not None:
            path = Path(self.checkpoint)
        elif folder is not None and (folder / FOLDER_WEIGHTS).is_file():
            path = folder / FOLDER_WEIGHTS
        elif folder is not None:  # timm finds others' files
            return str(folder), True
        elif cfg.get("source") == "hf-hub":
            return f"hf-hub:{cfg['hf_hub_id']}", False
        else:
            tag = f".{cfg['tag']}" if cfg.get("tag") else ""
            return f"released weights of {cfg.get('architecture', self.name)}{tag}", False
        # (custom_load: timm would read some models' weights as of another framework.)
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
        """Through the model's filter, which knows the layouts of its checkpoints."""
        if filter_fn is None:
            return state
        takes = inspect.signature(filter_fn).parameters
        try:
            return filter_fn(state, model) if len(takes) > 1 else filter_fn(state)
        except RunError:  # of a signal
            raise
        except ValueError as error:  # its own words
            raise ConfigError(f"{source} does not fit {self.name}: {one_line(error)}") from error
        except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
            # Filters count on the layouts that they know.
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
    """The line about weights that do not fit a model of so many tensors."""
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
    """The line about a file that cannot be read as weights."""
    if Path(path).is_dir():
        return f"no weights in {path}: {one_line(error)}"
    if unsafe_or_foreign(error):
        return (
            f"cannot load {path}: it is no checkpoint, or holds objects besides tensors, numbers and text, which could "
            "run code; save its state dict alone"
        )
    return f"cannot load {path}: it is damaged, or no checkpoint ({one_line(error)})"


def check_file(path: Path) -> None:
    """Raise ConfigError unless there is a file, or a folder of shards, that may hold weights."""
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
def _noting(model: nn.Module) -> Iterator[_Found]:
    """What load_state_dict finds missing and unexpected, noted after all renaming by hooks of modules."""
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
    """Names of the modules whose size is the number of classes; distilled models have two."""
    names = cfg.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _convolutions(cfg: dict[str, Any]) -> tuple[str, ...]:
    names = cfg.get("first_conv") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _describe(
    cfg: dict[str, Any], weights: dict[str, Tensor], model: nn.Module, in_chans: int, heads: tuple[str, ...]
) -> None:
    """Tell timm of which classes and channels a file is; else it would take them for those of the released weights."""
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
    """What timm is about to make fit, in words."""
    changes = []
    if heads and num_classes not in (0, cfg["num_classes"]):
        changes.append(f"new: {', '.join(heads)} {cfg['num_classes'] or 'none'} -> {num_classes}")
    for name in _convolutions(cfg):
        weight, channels = weights.get(f"{name}.weight"), cfg["input_size"][0]
        if weight is not None and channels != in_chans and weight.shape != model.get_submodule(name).weight.shape:
            changes.append(f"adapted: {name} {channels} -> {in_chans} channels")
    return changes


def _other_shapes(weights: dict[str, Tensor], own: dict[str, Tensor]) -> list[str]:
    both = ((name, tuple(weights[name].shape), tuple(own[name].shape)) for name in own if name in weights)
    return [f"{name} {shape} for {wanted}" for name, shape, wanted in both if shape != wanted]


def _some(names: list[Any]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(map(str, names[:NAMED])) + more
