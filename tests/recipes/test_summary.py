"""What a finished run tells the person who started it."""

import pytest
from rich.console import Console

from alphaadam_dist.training.summary import print_losses


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ({"AlphaAdam": 2.5, "AdamW": 2.75}, "AlphaAdam ends 0.2500 below AdamW on held-out text."),
        (
            {"AlphaAdam": 2.5, "look-ahead": 2.25, "AdamW": 2.75},
            "look-ahead ends 0.2500 below AlphaAdam and 0.5000 below AdamW on held-out text.",
        ),
        (
            {"AlphaAdam": 2.5, "look-ahead": 2.75, "AdamW": 2.5},
            "AlphaAdam ends level with AdamW and 0.2500 below look-ahead on held-out text.",
        ),
    ],
)
def test_the_verdict_names_the_lowest_and_how_far_the_others_are(
    losses: dict[str, float], said: str, capsys: pytest.CaptureFixture[str]
):
    print_losses(
        Console(width=200),
        {name: [{"step": 1, "loss": 3.0}, {"step": 1, "eval_loss": loss}] for name, loss in losses.items()},
    )
    assert said in capsys.readouterr().out
