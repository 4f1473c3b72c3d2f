"""Provenance statements, parsed and validated by the libraries of their formats."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.resource_descriptor import ResourceDescriptor
from in_toto_attestation.v1.statement import Statement
from packageurl import PackageURL


def read_statement(target: Path) -> Any:
    """Return the SLSA provenance beside a file, and assert that it is an in-toto statement about the file's content.

    The libraries reject unknown fields.
    """
    text = target.with_name(f"{target.name}.intoto.json").read_text()
    statement = Statement.copy_from_pb(json_format.Parse(text, statement_pb2.Statement()))
    statement.validate()
    assert statement.pb.predicate_type == "https://slsa.dev/provenance/v1"
    (subject,) = statement.pb.subject
    assert subject.name == target.name
    assert dict(subject.digest) == {"sha256": hashlib.sha256(target.read_bytes()).hexdigest()}
    provenance = json_format.ParseDict(json_format.MessageToDict(statement.pb.predicate), provenance_pb2.Provenance())
    for resource in provenance.build_definition.resolved_dependencies:
        ResourceDescriptor.copy_from_pb(resource).validate()
        assert resource.digest or resource.uri, resource
    return provenance


def by_role(provenance: Any, role: str) -> dict[str, Any]:
    """Return the dependencies of a role, by name."""
    found = provenance.build_definition.resolved_dependencies
    return {each.name: each for each in found if each.annotations["role"] == role}


def packages(provenance: Any) -> dict[str, PackageURL]:
    """Return the package URLs of the Debian packages, by name."""
    return {name: PackageURL.from_string(each.uri) for name, each in by_role(provenance, "package").items()}
