"""Expiry of results, derived from the age and the base of the package images that they were built with.

A result's state has `policies`, a list with one object for each package image that may expire:

    packages    the requested packages, for display
    base        the base's name in the script, and
    base_id     the id of the image that it resolved to; both empty if the script passes an image id
    arch        Debian's name of the job's architecture
    made        when the image was made, in seconds since 1970 by the builder's clock
    max_age     seconds after which it expires; None: never
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

DAY = 86400.0

Policy = Mapping[str, Any]
"""One of a state's `policies`."""


def policy_of(
    base: str, base_id: str, names: Iterable[str], arch: str, annotations: Mapping[str, str], max_age_days: float | None
) -> dict[str, Any]:
    """Return the policy of a package image.

    Args:
        base: the base, as written in the script.
        base_id: the image id that it resolved to.
        names: the packages.
        arch: Debian's name of the job's architecture.
        annotations: annotations of the package image.
        max_age_days: maximum age in days that the script sets; None or infinite for no limit.
    """
    by_name = not re.fullmatch(r"(sha256:)?[0-9a-f]{12,64}", base)
    listed = " ".join(sorted(set(names)))
    grows_old = listed and max_age_days is not None and math.isfinite(max_age_days)
    return {
        "packages": listed,
        "base": base if by_name else "",
        "base_id": base_id if by_name else "",
        "arch": arch,
        "made": _made_at(annotations) if grows_old else 0.0,
        "max_age": max_age_days * DAY if grows_old and max_age_days is not None else None,
    }


def seconds_left(state: Mapping[str, Any]) -> float | None:
    """Return the seconds from now until a result expires, 0 if it has expired; None: never.

    A clock that was set back cannot make it exceed the maximum age that the script sets.
    """
    left = [_seconds_left(policy) for policy in _policies(state)]
    return min((seconds for seconds in left if seconds is not None), default=None)


def why_expired(state: Mapping[str, Any], meaning: Callable[[str, str], str]) -> str:
    """Return why a result has expired, as a clause for display; empty if it is still valid.

    Args:
        state: state of the job.
        meaning: returns the id of the image on this builder that an image's name and an architecture resolve to now;
            empty if there is none, or if it cannot be determined.
    """
    for policy in _policies(state):
        if _seconds_left(policy) == 0:
            days = policy["max_age"] / DAY
            return f"the package image {_called(policy)} is older than {days:g} day{'' if days == 1 else 's'}"
    for policy in _policies(state):
        if policy["base"] and meaning(policy["base"], policy["arch"]) not in ("", policy["base_id"]):
            return f"{policy['base']} refers to another image now"
    return ""


def _made_at(annotations: Mapping[str, str]) -> float:
    """Return when a package image was made, in seconds since 1970; 0 if its annotations do not contain a valid time."""
    import calendar  # slow to import, and not needed in a client's session

    try:
        return float(calendar.timegm(time.strptime(annotations.get("gamebear.created", ""), "%Y-%m-%dT%H:%M:%SZ")))
    except ValueError:
        return 0.0


def _seconds_left(policy: Policy) -> float | None:
    if policy["max_age"] is None:
        return None
    age = time.time() - policy["made"]
    return float(min(max(policy["max_age"] - age, 0.0), policy["max_age"]))


def _called(policy: Policy) -> str:
    packages = policy["packages"]
    if len(packages) > 60:
        packages = f"{packages[:60].rpartition(' ')[0]} …"
    return f"of {policy['base']} with {packages}" if policy["base"] else f"with {packages}"


def _policies(state: Mapping[str, Any]) -> list[Policy]:
    listed = state.get("policies")
    known = {"packages", "base", "base_id", "arch", "made", "max_age"}
    return [policy for policy in listed if known <= set(policy)] if isinstance(listed, list) else []
