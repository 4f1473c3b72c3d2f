"""Digests of jobs: equal for equal inputs on every machine, different after any relevant change."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gamebear_tasks.jobspec.canonical_json import canonical_json
from gamebear_tasks.jobspec.spec import File, Job

ROOT = Path(__file__).parent.parent

names = st.text(st.characters(blacklist_characters="/\0"), min_size=1, max_size=20)
sha256s = st.binary(min_size=32, max_size=32).map(bytes.hex)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
files = st.builds(File, sha256s, st.booleans())
jobs = st.builds(
    Job,
    arch=st.sampled_from(["armhf", "arm64", "amd64"]),
    program=names,
    identity=sha256s,
    python=st.sampled_from(["", "3.11", "3.12"]),
    outputs=st.lists(names, min_size=1, max_size=4, unique=True).map(tuple),
    modules=st.dictionaries(names, files, max_size=3),
    inputs=st.dictionaries(names, files, max_size=3),
    sources=st.dictionaries(names, st.dictionaries(names, st.text(), max_size=2), max_size=3),
    args=st.dictionaries(names, values, max_size=4),
)


def shuffled(value: Any) -> Any:
    """Return an equal value whose dicts were filled in the opposite order."""
    if isinstance(value, dict):
        return {key: shuffled(value[key]) for key in reversed(value)}
    if isinstance(value, list):
        return [shuffled(item) for item in value]
    return value


@given(jobs)
def test_the_order_of_dicts_and_outputs_does_not_matter(job: Job) -> None:
    other = dataclasses.replace(
        job,
        outputs=tuple(reversed(job.outputs)),
        **{name: shuffled(dict(getattr(job, name))) for name in ("modules", "inputs", "sources", "args")},
    )
    assert other.digest == job.digest


@given(jobs, st.data())
def test_a_change_of_any_part_changes_the_digest(job: Job, data: st.DataObject) -> None:
    part = data.draw(st.sampled_from([item.name for item in dataclasses.fields(Job)]))
    other = data.draw(jobs)
    changed = dataclasses.replace(job, **{part: getattr(other, part)})
    same = changed.document() == job.document() and changed.canonical == job.canonical
    assert (changed.digest == job.digest) == same
    if part == "outputs":
        assert same == (sorted(job.outputs) == sorted(other.outputs))
    elif part not in ("args", "sources"):  # 1, 1.0 and True are equal to Python and not to JSON
        assert same == (getattr(job, part) == getattr(other, part))


def test_true_1_and_1_point_0_are_different_arguments() -> None:
    digests = {Job("armhf", "a.py", "0" * 64, ("x",), args={"n": n}).digest for n in (True, 1, 1.0, "1")}
    assert len(digests) == 4


@given(values)
def test_canonical_json_is_decoded_to_the_same_value(value: Any) -> None:
    text = canonical_json(value)
    assert text.isascii()
    assert json.loads(text) == value
    assert canonical_json(json.loads(text)) == text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_rejected(value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(value)


@pytest.mark.parametrize("value", [{1: "a"}, b"bytes", Path("x"), {"a": {2: 3}}])
def test_a_value_that_is_not_json_is_rejected(value: Any) -> None:
    with pytest.raises(TypeError):
        canonical_json(value)


# A job with all fields and its recorded digest: no release may change it without raising FORMAT.
WITNESS = Job(
    arch="armhf",
    program="größe.py",
    identity="1" * 64,
    outputs=("b", "a b\n"),
    modules={"lib/x.py": File("2" * 64)},
    inputs={"in\udcff": File("3" * 64, executable=True)},
    sources={"umtp": {"git": "4" * 40, "submodules": True}},
    args={"f": 0.1, "i": 10**30, "n": None, "t": [True, "\u2028", {"z": 1, "a": 2}]},
)
WITNESS_DIGEST = "4e5c4a1c83771d73178f40ec14e6d21af7f19fd1e19cd989fe7fc98b1267548b"


def test_the_reference_job_has_the_recorded_digest() -> None:
    assert WITNESS.digest == WITNESS_DIGEST


@settings(max_examples=3, deadline=None)
@given(st.integers(1, 2**32 - 1))
def test_another_process_with_another_hash_seed_gives_the_same_digest(seed: int) -> None:
    code = "from test_jobspec import WITNESS; print(WITNESS.digest)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == WITNESS_DIGEST
