"""Python runs this at its start under `alphaadam run`, which puts this folder in front of PYTHONPATH.

It imports alphaadam_dist as soon as somebody imports DeepSpeed or HF's training arguments, and until then nothing that
costs time. Then it runs the sitecustomize that it stands in front of. Every Python runs it, also one too old to have
alphaadam_dist.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType

HERE = os.path.dirname(os.path.abspath(__file__))
HOOK = os.path.join(os.path.dirname(HERE), "import_hook.py")


def import_alphaadam(tool: ModuleType) -> None:
    """Import the package and register it with the tool that has just been imported.

    It may have been imported before, in the middle of the tool's own import: HF's Trainer imports its arguments.

    Raises ImportError where the environment names an optimizer, which would be passed over without a word.
    """
    try:
        import alphaadam_dist
    except ImportError as error:
        missing = (
            f"alphaadam run: {sys.executable} cannot import alphaadam_dist ({error}), so {tool.__name__} does not know "
            "AlphaAdam here: install alphaadam-dist into that environment"
        )
        if os.environ.get("ALPHAADAM_OPTIM"):
            raise ImportError(missing) from error
        print(missing, file=sys.stderr)
    else:
        alphaadam_dist._register()


def run(spec: ModuleSpec | None) -> ModuleType:
    """The module of a spec, run."""
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    if spec.name == "sitecustomize":
        sys.modules[spec.name] = module  # what the import of this file then gives
    spec.loader.exec_module(module)
    return module


hook = run(spec_from_file_location("alphaadam_import_hook", HOOK))
for watched in hook.TOOLS:
    hook.when_imported(watched, import_alphaadam)

# behind this one alone: one before it, or that of another installation, may have run it in the same way
places = [os.path.abspath(entry) for entry in sys.path]
hidden = PathFinder.find_spec("sitecustomize", sys.path[places.index(HERE) + 1 :] if HERE in places else sys.path)
if hidden is not None:
    run(hidden)
