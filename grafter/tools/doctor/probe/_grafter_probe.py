"""Records what one process computes.

For the first call of a model, it records inputs, weights, random states and modes; for each call, the result; at the
end, weights and random states again. It observes calls from inside `Module.__call__`, changes no value and draws no
random number. Tensors are recorded as digests of their bytes, so that two digests are equal exactly if the tensors are
equal to the last bit.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import os
import random
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

_MOST_CALLS = 64
_PIECE_BYTES = 1 << 26
_WRAPPER_SEGMENTS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

Write = Callable[..., None]


def start(modules: Any, write: Write) -> None:
    """Start recording. `modules` is `torch.nn.modules.module`, as soon as it has run; `write` adds to the log."""
    probe = Probe(modules.Module, write)
    modules.Module.__call__ = probe.wrap(modules.Module.__call__)
    atexit.register(probe.record_end)


class Probe:
    """The probe of one process: records the calls of models with `write`."""

    def __init__(self, module_class: Any, write: Write) -> None:
        self._class, self._write = module_class, write
        self._depth = threading.local()
        self._calls = 0
        self._model: Callable[[], Any] = lambda: None

    def wrap(self, inner: Any) -> Any:
        depth = self._depth

        @functools.wraps(inner)
        def __call__(module: Any, *args: Any, **kwargs: Any) -> Any:
            level = getattr(depth, "value", 0)
            if level:
                return inner(module, *args, **kwargs)
            depth.value = 1
            try:
                seen = self._before(module, args, kwargs)
                value = inner(module, *args, **kwargs)
                if seen:
                    self._after(value)
                return value
            finally:
                depth.value = 0

        return __call__

    def record_end(self) -> None:
        model = self._model()
        if model is not None:
            with self._quietly("end"):
                self._write("end", calls=self._calls, weights=_weights(model), random_states=_random_states())

    def _before(self, module: Any, args: Any, kwargs: Any) -> bool:
        """Whether this is a call of a model."""
        if self._calls >= _MOST_CALLS:
            self._calls += 1
            return False
        # A loss function is not a model, and a module that is called while another one is being made is incomplete.
        if next(module.parameters(), None) is None or self._is_being_built():
            return False
        if self._calls == 0:
            self._model = weakref.ref(module)
            with self._quietly("first call"):
                self._write("first call", **_first_call(module, args, kwargs))
        self._calls += 1
        return True

    def _after(self, value: Any) -> None:
        with self._quietly("call"):
            self._write("call", number=self._calls - 1, outputs=_digests(value, "out"))

    @contextlib.contextmanager
    def _quietly(self, what: str) -> Iterator[None]:
        """Keep the program from noticing: record no gradient, hide from its modes, and record what fails."""
        import torch

        try:
            with torch.no_grad(), torch._C.DisableTorchFunction(), _no_dispatch_modes():
                yield
        except Exception as error:
            self._write("trouble", text=f"{what}: {type(error).__name__}: {error}"[:300])

    def _is_being_built(self) -> bool:
        frame = sys._getframe(3)
        while frame is not None:
            code = frame.f_code
            own = frame.f_locals.get(code.co_varnames[0]) if code.co_varnames else None
            if code.co_name == "__init__" and isinstance(own, self._class):
                return True
            frame = frame.f_back  # type: ignore[assignment]
        return False


def _no_dispatch_modes() -> Any:
    try:
        from torch.utils._python_dispatch import _disable_current_modes
    except ImportError:
        return contextlib.nullcontext()
    return _disable_current_modes()


def _first_call(module: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    return {
        "rank": _rank(),
        "model": type(module).__name__,
        "random_states": _random_states(),
        "inputs": _inputs(module, args, kwargs),
        "weights": _weights(module, with_means=True),
        "training": bool(module.training),
        "dropout": _active_dropout(module),
        "modes": _modes(),
        "devices": sorted({str(parameter.device) for parameter in module.parameters()}),
    }


def _rank() -> int:
    # Any: torch's stubs have untyped functions here.
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_rank())
    return int(os.environ.get("RANK", 0))


def _inputs(module: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    import inspect

    try:
        names = [
            parameter.name
            for parameter in inspect.signature(_unwrapped(module).forward).parameters.values()
            if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        ]
    except (TypeError, ValueError):
        names = []
    found: dict[str, Any] = {}
    for number, value in enumerate(args):
        found.update(_digests(value, names[number] if number < len(names) else str(number)))
    for name, value in kwargs.items():
        found.update(_digests(value, name))
    return found


def _unwrapped(module: Any) -> Any:
    """The module inside a wrapper: its `forward` has the names of the inputs."""
    inner = [module._modules[name] for name in _WRAPPER_SEGMENTS if name in module._modules]
    return _unwrapped(inner[0]) if len(inner) == len(module._modules) == 1 else module


def _digests(value: Any, name: str) -> dict[str, Any]:
    """The digest of each tensor in the value, by its path."""
    import torch
    from torch.utils import _pytree as pytree

    if isinstance(value, torch.Tensor):
        return {name: _describe(value)}
    leaves: list[tuple[Any, Any]]
    try:
        leaves, _ = pytree.tree_flatten_with_path(value)
    except ValueError:
        leaves = [((number,), leaf) for number, leaf in enumerate(pytree.tree_leaves(value))]
    return {
        ".".join([name, *(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)]): (
            _describe(leaf)
        )
        for path, leaf in leaves
        if isinstance(leaf, torch.Tensor)
    }


def _weights(module: Any, with_means: bool = False) -> dict[str, Any]:
    named = [*module.named_parameters(), *module.named_buffers()]
    return {_plain(name): _describe(tensor, with_means) for name, tensor in named}


def _plain(name: str) -> str:
    """The name without the segments of wrappers: torch.compile's, DDP's, ..."""
    return ".".join(segment for segment in name.split(".") if segment not in _WRAPPER_SEGMENTS)


def _random_states() -> dict[str, str]:
    import torch

    states = {"torch": _hash(bytes(torch.get_rng_state().numpy())), "python": _hash(repr(random.getstate()).encode())}
    numpy = sys.modules.get("numpy")
    if numpy is not None and hasattr(numpy, "random"):
        states["numpy"] = _hash(repr([part if isinstance(part, (str, int, float)) else part.tobytes()
                                      for part in numpy.random.get_state()]).encode())  # fmt: skip
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["cuda"] = _hash(bytes(torch.cuda.get_rng_state().numpy()))
    return states


def _active_dropout(module: Any) -> list[str]:
    """Modules that drop values now: torch's own, and those that hold a probability for a function of torch."""
    import torch

    found = []
    for name, part in module.named_modules():
        if not part.training:
            continue
        rates = [value for key, value in vars(part).items() if "dropout" in key.lower() and type(value) is float]
        if isinstance(part, torch.nn.modules.dropout._DropoutNd):
            rates.append(part.p)
        if any(rate > 0 for rate in rates):
            found.append(_plain(name) or type(part).__name__)
    return found


def _modes() -> dict[str, Any]:
    import torch

    return {
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "default dtype": str(torch.get_default_dtype()),
        "gradients": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled(),
        "cudnn benchmark": torch.backends.cudnn.benchmark,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _describe(tensor: Any, with_mean: bool = False) -> dict[str, Any]:
    import torch

    # Only this rank's part of a DTensor: the rest lies on other ranks.
    local = getattr(tensor, "_local_tensor", tensor)
    described: dict[str, Any] = {"shape": list(local.shape), "dtype": str(local.dtype).removeprefix("torch.")}
    try:
        if local.is_cuda and torch.cuda.is_current_stream_capturing():
            return described
        plain = local.detach()
        if with_mean and plain.is_floating_point() and plain.numel():
            described["abs_mean"] = float(plain.abs().mean(dtype=torch.float64))
        described["digest"] = _digest(plain)
    except Exception as error:
        described["unreadable"] = f"{type(error).__name__}"
    return described


def _digest(tensor: Any) -> str:
    """The digest of the values' bytes in order, on the CPU, a piece at a time. Integers count by value, not width."""
    import torch

    if tensor.dtype in (torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool):
        tensor = tensor.to(torch.int64)
    flat = tensor.contiguous().reshape(-1)
    digest = hashlib.blake2b(repr(list(tensor.shape)).encode(), digest_size=12)
    step = max(1, _PIECE_BYTES // max(1, flat.element_size()))
    for start in range(0, flat.numel(), step):
        digest.update(flat[start : start + step].cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=12).hexdigest()
