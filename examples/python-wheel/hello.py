"""Say hello."""


def main() -> None:
    """Print a line."""
    print("hello")
