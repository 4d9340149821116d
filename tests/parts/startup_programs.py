"""Programs that never import grafter, for test_startup.py. `python startup_programs.py NAME [ARGUMENT ...]`.

Each prints one line of JSON: what the process found of grafter's doing once it was through. `each NAME ...` runs
several, each in a process that is forked as soon as torch is imported, since the import is most of what a program
costs; they print their names beside it.
"""

from __future__ import annotations

import copy
import gc
import json
import multiprocessing
import os
import sys
import weakref
from typing import Any

import torch


class Layer(torch.nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.up = torch.nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.up(x))


class Model(torch.nn.Module):
    def __init__(self, first: int = 0, count: int = 2) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleDict({str(first + i): Layer() for i in range(count)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x


class Reward(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x)


def call(model: torch.nn.Module, times: int = 1) -> None:
    with torch.no_grad():
        for _ in range(times):
            model(torch.ones(1, 4))


def found() -> dict[str, Any]:
    """What grafter has done to this process; `points` are the names that came, each with how often."""
    module = torch.nn.modules.module
    own = getattr(sys.modules.get("grafter._process"), "grafter", None)
    watcher = getattr(sys.modules.get("grafter.rank.autoattach.first_call"), "_watcher", None)
    return {
        "torch": [
            module.Module.__call__.__qualname__,
            hasattr(module.Module.__call__, "__wrapped__"),
            hasattr(module.Module.__setstate__, "__wrapped__"),
            len(module._global_module_registration_hooks),
        ],
        "hooks": len(module._global_forward_pre_hooks) + len(module._global_forward_hooks),
        "armed": watcher is not None and watcher.armed,
        "step": own and own.steps.step,
        "points": own and own._unmatched,
        "rank": own and own.context.place.role_rank,
    }


def show(result: Any) -> None:
    # The rank that this process is now would wait for the other job.
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()
    os._exit(0)


def plain() -> Any:
    call(Model(), 3)
    return found()


def no_module() -> Any:
    torch.ones(2).sum()
    return {
        **found(),
        "grafter": sorted(name for name in sys.modules if name.startswith("grafter")),
        "pydantic": "pydantic" in sys.modules,
    }


def two_models() -> Any:
    model, reward = Model(), Reward()
    call(model)
    call(reward)
    late = Reward()
    call(late)
    return found()


def attaches_late() -> Any:
    """It calls its model before it attaches it, and calls another one that it leaves alone."""
    import grafter

    model = Model()
    call(model)
    grafter.attach(model, "layers.0")
    call(model, 2)
    model.layers["2"] = Layer()
    call(model)
    call(Reward())
    return found()


def chunks() -> Any:
    """As a pipeline stage has them: two instances of one class, each with its own layers."""
    first, second = Model(0), Model(2)
    call(first)
    call(second)
    return found()


def copies() -> Any:
    # With some weights nothing gets through the ReLU.
    torch.manual_seed(0)
    model = Model()
    call(model)
    average = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.zero_()
        outputs = [m(torch.ones(1, 4)).abs().sum().item() for m in (model, average)]
    return {**found(), "outputs": outputs}


def made_anew() -> Any:
    """A model that is made in each iteration, beside one of the same class that is kept."""
    kept, seen = None, []
    for _ in range(3):
        model = Model()
        seen.append(weakref.ref(model))
        call(model)
        kept = kept or Model()
        call(kept)
        del model
    gc.collect()
    alive = [thing for thing in gc.get_objects() if type(thing) is Model]
    return {**found(), "alive": len(alive) + sum(reference() is not None for reference in seen)}


def in_a_list() -> Any:
    models = [Model(), Model(), Model()]
    for model in reversed(models):
        call(model)
    return found()


def held_by_nothing() -> Any:
    """But by an argument, which is the word of the function that calls it."""
    model = Model()
    call(model)
    hidden = {1: Model()}
    call(hidden[1])
    return found()


def grown() -> Any:
    model = Model()
    call(model)
    model.layers["7"] = Layer()
    call(model)
    return found()


def part_called_alone() -> Any:
    model = Model()
    call(model.layers["1"])
    call(model)
    return found()


class Measuring(torch.nn.Module):
    """Calls its own part while it is being built, to learn a width."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Model()
        self.width = self.body(torch.ones(1, 4)).shape[-1]
        self.head = torch.nn.Linear(self.width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


def built_with_a_call() -> Any:
    call(Measuring())
    return found()


def loss_first() -> Any:
    model, loss = Model(), torch.nn.MSELoss()
    loss(torch.ones(2), torch.zeros(2))
    waiting = found()
    call(model)
    return {**found(), "before": waiting["points"]}


def forward_alone() -> Any:
    model = Model()
    with torch.no_grad():
        for _ in range(2):
            model.forward(torch.ones(1, 4))
    return found()


def compiled() -> Any:
    """The model is called for the first time by code that is being compiled."""
    model = Model()
    function = torch.compile(lambda x: model(x) + 1, backend="eager")
    with torch.no_grad():
        for _ in range(3):
            function(torch.ones(1, 4))
    return found()


def training(ends_a_step: str | None = None) -> Any:
    """Two iterations of two microbatches, with a validation after each. `ends_a_step`: GRAFTER_STEP."""
    if ends_a_step is not None:
        os.environ["GRAFTER_STEP"] = ends_a_step
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps = []
    for _ in range(2):
        for _ in range(2):
            model(torch.ones(1, 4)).sum().backward()
            steps.append(found()["step"])
        optimizer.step()
        call(model)
        steps.append(found()["step"])
    return steps


def counts_itself() -> Any:
    import grafter

    model = Model()
    for _ in range(3):
        call(model, 2)
        grafter.step()
    return found()


def in_child(method: str) -> Any:
    """Three processes that call a model, as `torch.multiprocessing.spawn` or a rank of a launcher would."""
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    children = [context.Process(target=_child, args=(queue,)) for _ in range(1)]
    for child in children:
        child.start()
    results = [queue.get(timeout=250) for _ in children]
    return {"parent": found(), "child": results[0]}


def _child(queue: Any) -> None:
    call(Model())
    queue.put(found())
    queue.close()
    queue.join_thread()
    os._exit(0)


def child_of_rank(method: str) -> Any:
    """A helper that a rank starts after it has joined calls models of its own, and the rank's."""
    model = Model()
    call(model)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_helper, args=(queue, model if method == "fork" else None))
    child.start()
    result = queue.get(timeout=250)
    child.join()
    call(model)
    return {"parent": found(), "child": result}


def _helper(queue: Any, model: torch.nn.Module | None) -> None:
    if model is not None:
        call(model)
    call(Model())
    hooks = 0 if model is None else sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    queue.put({**found(), "hooks left": hooks})
    queue.close()
    queue.join_thread()
    os._exit(0)


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self) -> None:
        self.model = Model()

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> torch.Tensor:
        with torch.no_grad():
            self.model(torch.ones(1, 4))
        return torch.tensor(float(found()["points"] is None))


def data_loader() -> Any:
    rows = list(torch.utils.data.DataLoader(Rows(), num_workers=1))
    return {**found(), "left alone": [float(row) for row in rows]}


def each(*names: str) -> Any:
    """Each name may have an argument: `training:manual`. Ends with the highest exit code of all."""
    codes = []
    for name in names:
        child = os.fork()
        if child == 0:
            program, *arguments = name.split(":")
            show({name: globals()[program](*arguments)})
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    sys.exit(max(abs(code) for code in codes))


def main() -> None:
    name, *arguments = sys.argv[1:]
    show(globals()[name](*arguments))


if __name__ == "__main__":
    main()
