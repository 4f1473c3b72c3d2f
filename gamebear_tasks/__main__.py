"""Entry point of `python -m gamebear_tasks`, which runs `gamebear`."""

from .cli.main import main

main()
