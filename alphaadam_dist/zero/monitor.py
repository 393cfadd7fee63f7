"""alpha, agreement and the other metrics in DeepSpeed's monitor (TensorBoard, CSV, wandb), when DeepSpeed prints."""

from typing import Any

from ..optimizer import AlphaOptimizer


def attach(engine: Any, optimizer: AlphaOptimizer) -> None:
    """Write ``Train/AlphaAdam/*`` beside the learning rate, every ``steps_per_print`` steps, from rank 0.

    The middle is the name of the class. Reading the numbers waits for the device, so other steps are left alone.
    """
    write, every = engine.monitor.write_events, engine.steps_per_print()
    if not engine.monitor.enabled or every is None:
        return

    def write_with_ours(events: list[tuple[str, float, int]], *args: Any, **kwargs: Any) -> None:
        learning_rate = any(name == "Train/Samples/lr" for name, *_ in events)
        if learning_rate and engine.global_steps % every == 0:
            where = f"Train/{type(optimizer).__name__}"
            ours = [(name, value) for name, value in optimizer.metrics().items() if value is not None]
            events = [*events, *((f"{where}/{name}", value, engine.global_samples) for name, value in ours)]
        write(events, *args, **kwargs)

    engine.monitor.write_events = write_with_ours
