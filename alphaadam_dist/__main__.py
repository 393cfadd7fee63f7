"""What the script `alphaadam` and `python -m alphaadam_dist` start: the command line, if its packages are there."""

import sys


def main() -> None:
    """Run the command line. Exits with 1 where typer or rich is not installed, and says how to install them."""
    try:
        from .cli import app
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] not in ("typer", "rich"):
            raise
        sys.exit(f"Error: {error}: the command line needs pip install 'alphaadam-dist[cli]'")
    app()


if __name__ == "__main__":
    main()
