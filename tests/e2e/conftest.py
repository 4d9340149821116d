"""What the tests between real programs need: packages (`./launch/test.sh --e2e` installs them) and a checkpoint."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import save_file

PROGRAMS = Path(__file__).parent / "programs"
# The test process and the programs share `common` and `rope_order`; the tests share `pair`.
sys.path[:0] = [str(PROGRAMS), str(PROGRAMS.parent)]

_missing = [name for name in ("transformers", "torchtitan", "megatron") if importlib.util.find_spec(name) is None]
if _missing:
    raise pytest.UsageError(f"tests/e2e needs {', '.join(_missing)}: run ./launch/test.sh --e2e, which installs them.")


@pytest.fixture(scope="session", autouse=True)
def environment() -> Iterator[None]:
    """What both jobs inherit: one thread a rank (more would only wait for each other here), and no network."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("GRAFTER_", "DUMPER_GRAFTER_")):
                patch.delenv(name)
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        # Megatron says that there is no Apex and no Transformer Engine, 16 times.
        patch.setenv("PYTHONWARNINGS", "ignore")
        yield


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint that all programs share."""
    from common import make_weights

    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_file(make_weights(seed=0), path)
    return path
