"""For how long a result holds: what the package images that it was built with say of their own age and base.

A result's state has `policies`, a list with one object for each package image that may grow old:

    packages    what was asked for, for people
    base        the base's name as the script says it, and
    base_id     the image that it meant; both empty where the base is an image's id, or nothing hangs on its name
    arch        Debian's name of the job's architecture
    made        when the image was made, in seconds since 1970 by the builder's clock
    max_age     seconds after which it is too old; None: never
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
        base: the base as the script says it.
        base_id: the id that it had.
        names: the packages.
        arch: Debian's name of the job's architecture.
        annotations: the image's.
        max_age_days: what the script says.
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
    """Return for how many seconds from now a result still holds, 0 where it is too old; None: for ever.

    However the clock was put, it is never more than the age that the script allows.
    """
    left = [_seconds_left(policy) for policy in _policies(state)]
    return min((seconds for seconds in left if seconds is not None), default=None)


def why_expired(state: Mapping[str, Any], meaning: Callable[[str, str], str]) -> str:
    """Return why a result holds no more, as a sentence's part for people; empty where it does.

    Args:
        state: the job's.
        meaning: given an image's name and an architecture, returns the id of the image on this builder that it means
            now; empty where there is none, or where that cannot be told.
    """
    for policy in _policies(state):
        if _seconds_left(policy) == 0:
            days = policy["max_age"] / DAY
            return f"the package image {_called(policy)} is older than {days:g} day{'' if days == 1 else 's'}"
    for policy in _policies(state):
        if policy["base"] and meaning(policy["base"], policy["arch"]) not in ("", policy["base_id"]):
            return f"{policy['base']} has come to mean another image"
    return ""


def _made_at(annotations: Mapping[str, str]) -> float:
    """Return when a package image was made, in seconds since 1970; 0 where it does not say."""
    import calendar  # slow to load, and a session of a client's has no need of it

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
