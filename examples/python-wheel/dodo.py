"""Build hello. Run `doit`."""

from gamebear_tasks import artifact, folder, live

DOIT_CONFIG = {"default_tasks": ["hello"], "reporter": live}


def task_hello():
    """Build the Python wheel hello."""
    return artifact(
        "buildscripts/hello.py",
        sources={"src": folder(exclude=["/dodo.py", "/buildscripts/"])},
        outputs=["build/hello/*.whl"],
    )
