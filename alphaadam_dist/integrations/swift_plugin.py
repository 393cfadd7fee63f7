"""ms-swift: ``--external_plugins`` with the path of this file, and ``--optimizer alphaadam``.

swift imports the file by its path and puts this folder in front of sys.path: imports are absolute here, and no file of
this folder has the name of a package.
"""

from typing import Any

from swift.optimizers import OptimizerCallback, optimizers_map

from alphaadam_dist.integrations import hf_trainer


def _callback(name: str) -> type[OptimizerCallback]:
    class AlphaOptimizerCallback(OptimizerCallback):
        """Makes the Trainer's ``optim`` what ``--optimizer`` says; the Trainer builds it, with ``--optim_args``."""

        def __init__(self, args: Any, trainer: Any) -> None:
            args.optim = name
            super().__init__(args, trainer)

    return AlphaOptimizerCallback


optimizers_map.update({name: _callback(name) for name in hf_trainer.names()})
