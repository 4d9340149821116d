"""The first call of a model in a program that never heard of grafter.

watching    hooks on what registers a submodule or parameter, and on what copies or unpickles a module: a call of a
            model costs nothing more
armed       a module was made, and no model called since: `Module.__call__` is ours until one is called
attached    that call attaches all models that the program has, and watching continues

A program that makes no module is never armed. A process that has joined leaves a mark for those that it starts, and a
forked child of it is left alone: they are helpers. Imported while torch is being imported, so without torch itself.
"""

from __future__ import annotations

import functools
import gc
import os
import sys
import threading
import weakref
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

from grafter.rank.autoattach.startup.sitecustomize import HELPER_MARK, ImportAwaited

_COMPILER = "torch._dynamo.utils"

_watcher: Watcher | None = None


def watch(modules: Any) -> None:
    """Begin to watch. `modules` is `torch.nn.modules.module`, as soon as it has run."""
    global _watcher
    if _watcher is None:
        _watcher = Watcher(modules, attach_roots)
        os.register_at_fork(after_in_child=_after_fork)


def watch_from_here() -> None:
    """The same in a program that has torch and its models already: they are attached at the next call of one."""
    if _watcher is None and HELPER_MARK not in os.environ:
        modules: Any = sys.modules["torch.nn.modules.module"]
        watch(modules)
        assert _watcher is not None
        for thing in gc.get_objects():
            # By type alone: looking at an object's attributes may run code of its own.
            if issubclass(type(thing), modules.Module):
                _watcher._notice(thing)


def attach_roots(called: Any, made: list[Any]) -> Any:
    """Imported late: it needs torch and pydantic."""
    from grafter.rank.autoattach.roots import Roots

    return Roots(called, made)


class Watcher:
    """One process's. `attach(called module, modules made so far)` gives what knows the roots from then on."""

    def __init__(self, modules: Any, attach: Callable[[Any, list[Any]], Any]) -> None:
        self._class = modules.Module
        self._attach = attach
        self._roots: Any = None
        self._made: dict[int, Any] = {}
        self._lock = threading.RLock()
        self._busy = False
        self._process_id = os.getpid()
        self._call = self._class.__call__
        self._armed_call = self._wrap_call()
        self._set_state = self._class.__setstate__
        self._handles = [
            modules.register_module_module_registration_hook(self._notice),
            modules.register_module_parameter_registration_hook(self._notice),
        ]
        self._class.__setstate__ = self._wrap_set_state()
        if _COMPILER not in sys.modules:
            ImportAwaited(_COMPILER, lambda compiler: self._correct_compiler(compiler))

    @property
    def armed(self) -> bool:
        return self._class.__call__ is self._armed_call

    def stop(self) -> None:
        """Leave torch as it was; what is attached is detached."""
        self._disarm()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._made.clear()
        if getattr(self._class.__setstate__, "__wrapped__", None) is self._set_state:
            self._class.__setstate__ = self._set_state
        if self._roots is not None:
            self._roots.detach()
            self._roots = None

    def after_fork(self) -> None:
        """In the child. One that was forked before any model was called may be a rank of its own."""
        self._lock = threading.RLock()
        if self._roots is not None:
            self.stop()

    # While modules are made.

    def _notice(self, module: Any, *_: Any) -> None:
        number = id(module)
        if number not in self._made:
            self._made[number] = weakref.ref(module, lambda _: self._made.pop(number, None))
            if not self.armed:
                self._arm()

    def _wrap_set_state(self) -> Any:
        inner, notice = self._set_state, self._notice

        @functools.wraps(inner)
        def __setstate__(module: Any, state: Any) -> None:
            inner(module, state)
            notice(module)

        return __setstate__

    # While a call is awaited.

    def _wrap_call(self) -> Any:
        inner, on_call = self._call, self._on_call

        @functools.wraps(inner)
        def __call__(module: Any, *args: Any, **kwargs: Any) -> Any:
            on_call(module) if _COMPILER not in sys.modules else _call_apart(on_call, module)
            return inner(module, *args, **kwargs)

        # As `torch.compiler.disable` would say it, which imports the compiler.
        __call__._torchdynamo_disable = True  # type: ignore[attr-defined]
        return __call__

    def _arm(self) -> None:
        # Somebody else may have put a function of theirs there (a tracer, for as long as it traces).
        # torch.export makes a module of its own around the model, and follows each call that it sees.
        if self._class.__call__ is self._call and self._handles and not _is_exporting():
            self._class.__call__ = self._armed_call
            _leave_uncompiled(self._armed_call.__code__)

    def _disarm(self) -> None:
        if self.armed:
            self._class.__call__ = self._call

    def _correct_compiler(self, compiler: Any) -> None:
        """What the compiler takes for torch's own function, as long as it is ours, is a call that it does not run."""
        if getattr(compiler, "unpatched_nn_module_call", None) is self._armed_call:
            compiler.unpatched_nn_module_call = self._call

    def _on_call(self, module: Any) -> None:
        if not self._handles or not self._made:
            self._disarm()
            return
        if next(module.parameters(), None) is None or _is_being_built(self._class):
            return
        if _is_data_loader_worker():
            self.stop()
            return
        with self._lock:
            if self._busy or not self._made:
                return
            self._busy = True
            try:
                if self._roots is None:
                    gc.collect()  # models that nothing refers to any more are not models of the program
                made = [made for reference in list(self._made.values()) if (made := reference()) is not None]
                self._made.clear()
                self._disarm()
                if self._roots is None:
                    os.environ[HELPER_MARK] = str(os.getpid())
                    self._roots = self._attach(module, made)
                else:
                    self._roots.extend(module, made)
            finally:
                self._busy = False


def _after_fork() -> None:
    if _watcher is not None:
        _watcher.after_fork()


def _is_being_built(module_class: type) -> bool:
    """Whether a module calls a part of itself before it is whole, to learn a shape or to set up weights."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__init__" and code.co_varnames and isinstance(_first_local(frame), module_class):
            return True
        frame = frame.f_back
    return False


def _first_local(frame: FrameType) -> Any:
    return frame.f_locals.get(frame.f_code.co_varnames[0])


def _is_exporting() -> bool:
    compiler = sys.modules.get("torch.compiler")
    return compiler is not None and bool(getattr(compiler, "is_exporting", bool)())


def _is_data_loader_worker() -> bool:
    worker = sys.modules.get("torch.utils.data._utils.worker")
    return worker is not None and worker._worker_info is not None


def _call_apart(function: Callable[[Any], None], module: Any) -> None:
    """As the compiler, which may be tracing the caller, leaves it alone."""
    import torch.compiler

    torch.compiler.disable(function)(module)  # type: ignore[no-untyped-call]


def _leave_uncompiled(code: CodeType) -> None:
    frames = sys.modules.get("torch._dynamo.eval_frame")
    if frames is not None and hasattr(frames, "skip_code"):
        frames.skip_code(code)
