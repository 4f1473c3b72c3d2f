"""`python -m gamebear_tasks` is `gamebear`."""

from .cli.main import main

main()
