"""Importing alphaadam_dist imports no DeepSpeed and survives any; the optimizers are there whoever comes first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alphaadam_dist import AlphaAdam, import_hook
from alphaadam_dist.zero import registration


def run(code: str, path: Path | str = "") -> str:
    """What a fresh Python prints, with a folder in front of its path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path), *sys.path]), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done.stdout


BROKEN = """
import sys
from pathlib import Path

import alphaadam_dist
heavy = {"torch", "deepspeed", "transformers", "triton", "accelerate"} & set(sys.modules)
assert not heavy, heavy
import torch
assert alphaadam_dist.AlphaAdam is torch.optim.AlphaAdam
heavy = {"deepspeed", "transformers", "triton", "accelerate"} & set(sys.modules)
assert not heavy, heavy

def attempt(what):
    for name in [name for name in sys.modules if name.split(".")[0] == "deepspeed"]:
        del sys.modules[name]
    sys.path_importer_cache.clear()
    try:
        import deepspeed.runtime.engine as engine
        print(what, "imported")
    except BaseException as error:
        print(what, type(error).__name__, error)

ours, theirs = alphaadam_dist.AlphaAdam([torch.zeros(1)]), torch.optim.AdamW([torch.zeros(1)])
sys.path[:] = [FOLDER]  # without the DeepSpeed that is installed
sys.dont_write_bytecode = True
package = Path(FOLDER) / "deepspeed"
attempt("missing")
package.mkdir()
attempt("a folder of that name")
for line in ("raise ImportError('no')", "raise OSError('libcuda')", "raise RuntimeError('triton')", "1 / 0",
             "raise SystemExit(3)", "import torch; torch.no_such"):
    (package / "__init__.py").write_text(line)
    attempt(line)
(package / "__init__.py").write_text("__version__ = '9.9'")
attempt("no runtime")
(package / "runtime").mkdir()
(package / "runtime" / "__init__.py").touch()
(package / "runtime" / "engine.py").write_text("raise ImportError('inner')")
attempt("engine raises")
(package / "runtime" / "engine.py").write_text("something = 1")
attempt("engine without its class")
(package / "runtime" / "engine.py").write_text(
    "class DeepSpeedEngine:\\n"
    "    def __init__(self, optimizer):\\n        self.optimizer = optimizer"
)
attempt("another engine")
from deepspeed.runtime.engine import DeepSpeedEngine
DeepSpeedEngine(theirs)
try:
    DeepSpeedEngine(ours)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.slow
def test_no_deepspeed_can_break_the_import(tmp_path: Path) -> None:
    told = run(BROKEN.replace("FOLDER", repr(str(tmp_path))), tmp_path).splitlines()
    assert told[:2] == [
        "missing ModuleNotFoundError No module named 'deepspeed'",
        "a folder of that name ModuleNotFoundError No module named 'deepspeed.runtime'",
    ]
    assert told[2:8] == [
        "raise ImportError('no') ImportError no",
        "raise OSError('libcuda') OSError libcuda",
        "raise RuntimeError('triton') RuntimeError triton",
        "1 / 0 ZeroDivisionError division by zero",
        "raise SystemExit(3) SystemExit 3",
        "import torch; torch.no_such AttributeError module 'torch' has no attribute 'no_such'",
    ]
    assert told[8:12] == [
        "no runtime ModuleNotFoundError No module named 'deepspeed.runtime'",
        "engine raises ImportError inner",
        "engine without its class imported",
        "another engine imported",
    ]
    assert told[12].startswith(
        "alphaadam_dist cannot run under DeepSpeed 9.9, which has moved: it no longer has deepspeed.runtime.engine."
    )
    assert "Install a tested version" in told[12]


AFTER = """
import os
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
import torch
import torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
import alphaadam_dist
import deepspeed
from deepspeed.pipe import PipelineModule
model = torch.nn.Linear(3, 3)
config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1},
          "optimizer": {"type": "AlphaAdam", "params": {"lr": 0.1}}}
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
for _ in range(2):
    engine.backward(engine(torch.ones(1, 3)).sum())
    engine.step()
print(type(engine.basic_optimizer).__name__, engine.basic_optimizer.agreement["agree"])
"""


@pytest.mark.slow
def test_deepspeed_may_be_imported_later() -> None:
    """By somebody who names no optimizer of ours, but in the JSON."""
    assert run(AFTER).splitlines()[-1] == "AlphaAdam 12"


NAMES = """
import sys
import alphaadam_dist
assert {"AlphaAdam", "AlphaLion", "AlphaSGD", "__version__"} <= set(dir(alphaadam_dist))
assert not hasattr(alphaadam_dist, "AlphaAdm")
assert "torch" not in sys.modules
from alphaadam_dist import *
print(AlphaAdam.__name__, AlphaLion.__name__, AlphaSGD.__name__)
"""


@pytest.mark.slow
def test_the_optimizers_are_loaded_when_they_are_asked_for() -> None:
    assert run(NAMES) == "AlphaAdam AlphaLion AlphaSGD\n"


def fake(**methods: Any) -> Any:
    """A DeepSpeed's engine module, of another version than the tested ones."""
    return SimpleNamespace(DeepSpeedEngine=type("DeepSpeedEngine", (), methods))


def past_the_hook(monkeypatch: pytest.MonkeyPatch, **methods: Any) -> Any:
    """The class of an engine that somebody else's import hook has imported, so that ours has not seen it."""
    engine = fake(**{**dict.fromkeys(registration.METHODS, lambda self, *_: None), **methods})
    monkeypatch.setitem(sys.modules, registration.ENGINE, engine)
    return engine.DeepSpeedEngine


def test_an_engine_imported_past_the_hook_is_wrapped_when_an_optimizer_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    engine_class = past_the_hook(monkeypatch)
    assert not hasattr(engine_class._configure_optimizer, "alphaadam")
    AlphaAdam([torch.nn.Parameter(torch.ones(1))])
    assert engine_class._configure_optimizer.alphaadam


def test_an_engine_that_is_already_configuring_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The optimizer of a JSON is made inside the method that would have to attach to it."""

    def configure(self: Any) -> None:
        optimizer = AlphaAdam([torch.nn.Parameter(torch.ones(1))])
        self._do_optimizer_sanity_check(optimizer)

    engine = past_the_hook(monkeypatch, _configure_optimizer=configure)()
    with pytest.raises(RuntimeError, match=r"had begun before .* `import alphaadam_dist` before deepspeed.initialize"):
        engine._configure_optimizer()


def test_a_finder_that_asks_all_others_ends() -> None:
    finder = import_hook._Finder(registration.ENGINE, registration._wrap)

    class Asking:
        def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
            return finder.find_spec(name, path, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "meta_path", [finder, Asking()])
        assert finder.find_spec(registration.ENGINE, None) is None


def test_wrapping_an_engine_twice_changes_nothing() -> None:
    methods = dict.fromkeys(registration.METHODS, lambda self, *_: None)
    engine = fake(**methods)
    registration._wrap(engine)
    once = dict(vars(engine.DeepSpeedEngine))
    registration._wrap(engine)
    assert dict(vars(engine.DeepSpeedEngine)) == once
    assert "__init__" not in once  # all that is wrapped is there


@pytest.mark.parametrize("lacking", registration.METHODS)
def test_an_engine_that_lacks_a_method_fails_where_an_optimizer_meets_it(lacking: str) -> None:
    def init(self: Any, optimizer: Any) -> None:
        self.basic_optimizer = optimizer

    methods = dict.fromkeys(registration.METHODS, lambda self, *_: None)
    del methods[lacking]
    engine = fake(__init__=init, **methods)
    registration._wrap(engine)
    params = [torch.nn.Parameter(torch.ones(1))]
    engine.DeepSpeedEngine(torch.optim.AdamW(params))
    with pytest.raises(RuntimeError, match=f"no longer has deepspeed.runtime.engine.DeepSpeedEngine.{lacking}"):
        engine.DeepSpeedEngine(AlphaAdam(params))
