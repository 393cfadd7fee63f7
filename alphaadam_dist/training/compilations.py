"""Says that DeepSpeed compiles an operator: it does so at its first use, for minutes and without a word."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from alphaadam_dist.training.leftovers import locks

_LOOK_SECONDS = 1.0


@contextmanager
def announced(say: Callable[[str], None]) -> Iterator[None]:
    """While the context lasts, call ``say``, from another thread, with a line for each operator's first compilation."""
    ended = threading.Event()
    watching = threading.Thread(target=_watch, args=(say, ended), daemon=True)
    watching.start()
    try:
        yield
    finally:
        ended.set()
        watching.join()


def _watch(say: Callable[[str], None], ended: threading.Event) -> None:
    told: set[str] = set()
    while not ended.wait(_LOOK_SECONDS):
        for lock in locks():
            name = lock.parent.name
            # torch takes the lock also where the library is there and nothing is to be done
            if name not in told and not any(lock.parent.glob("*.so")):
                told.add(name)
                say(f"DeepSpeed compiles its operator {name}, once on this machine: this takes a minute or more.")
