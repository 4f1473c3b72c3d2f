"""Typed interface to `distributed`: every name that this package uses of it.

This is the only module that imports `distributed`. mypy skips Dask's own annotations, which are incomplete; the
protocols below declare the attributes in use. Attributes that Dask does not document (`rpc`, `connection_args`,
`security`, `state`, and the stream of a connection) are used only here.
"""

from __future__ import annotations

import contextlib
import inspect
import ssl
import weakref
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Protocol, cast

import distributed
from distributed.comm import connect as _connect
from distributed.core import Status as _Status
from distributed.security import Security as _Security

TESTED = ("2024.8", "2026.8")
"""Oldest and newest release of `distributed` with which this package is tested."""

DONT_REPLY: object = _Status.dont_reply
"""Result of a handler that has sent its replies itself."""

Operation = Callable[..., Awaitable[object]]
"""What a scheduler or worker does on a message: called with the message's fields, and returns the reply."""

_SCHEDULER = ("handlers", "extensions", "workers", "rpc", "address", "security", "connection_args")
_WORKER = ("handlers", "extensions", "state", "scheduler", "address")


class Comm(Protocol):
    """A connection, as Dask's handlers receive it. All methods raise OSError after the connection broke."""

    async def read(self) -> Mapping[str, object]:
        """Receive a message."""

    async def write(self, msg: Mapping[str, object]) -> object:
        """Send a message."""

    async def close(self) -> None:
        """Flush and close the connection."""

    def abort(self) -> None:
        """Close the connection without flushing."""


class WorkerState(Protocol):
    """What a scheduler knows of a worker."""

    @property
    def address(self) -> str:
        """Dask address."""

    @property
    def name(self) -> object:
        """Name that its owner gave it."""

    @property
    def resources(self) -> Mapping[str, float]:
        """Amount of each resource."""

    @property
    def used_resources(self) -> Mapping[str, float]:
        """Amount of each resource that running tasks hold."""


class Scheduler(Protocol):
    """A Dask scheduler."""

    @property
    def address(self) -> str:
        """Dask address."""

    @property
    def workers(self) -> Mapping[str, WorkerState]:
        """Registered workers, by address."""


class Worker(Protocol):
    """A Dask worker."""

    @property
    def address(self) -> str:
        """Dask address."""


class Future(Protocol):
    """A submitted task."""

    @property
    def status(self) -> str:
        """One of `pending`, `finished`, `cancelled`, `lost`, `error`."""

    async def exception(self) -> BaseException | None:
        """Return the exception of a failed task."""

    def release(self) -> None:
        """Stop wanting the task: the scheduler forgets it."""


class Client(Protocol):
    """A Dask client with `asynchronous=True`."""

    def submit(
        self,
        function: Callable[..., object],
        *args: object,
        key: str,
        resources: Mapping[str, float],
        workers: list[str] | None,
        pure: bool,
    ) -> Future:
        """Submit a task."""

    def as_current(self) -> contextlib.AbstractContextManager[object]:
        """Make this the client that module-level functions of Dask use in this context."""

    async def run(self, function: Callable[..., object], *, workers: list[str], on_error: str) -> Mapping[str, object]:
        """Call a function on workers; return the results by worker address."""

    async def close(self, timeout: float) -> None:
        """Close the client."""


if TYPE_CHECKING:

    class SchedulerPlugin:
        """Base class of scheduler plug-ins."""

        name: str

else:
    from distributed import SchedulerPlugin

__all__ = ["SchedulerPlugin"]


class _Remote(Protocol):
    def __getattr__(self, operation: str) -> Operation: ...


class _SchedulerInternals(Protocol):
    address: str
    security: _SecuritySettings | None
    connection_args: Mapping[str, object]

    def rpc(self, address: str) -> _Remote: ...


class _WorkerInternals(Protocol):
    scheduler: _Remote
    state: _StateMachine


class _StateMachine(Protocol):
    total_resources: Mapping[str, float]


class _SecuritySettings(Protocol):
    tls_ca_file: str | None
    tls_ciphers: str | None
    tls_client_cert: str | None
    tls_client_key: str | None
    tls_scheduler_cert: str | None
    tls_scheduler_key: str | None
    require_encryption: bool | None

    def get_connection_args(self, role: str) -> Mapping[str, object]: ...


class _ServerInternals(Protocol):
    handlers: dict[str, Operation]
    extensions: dict[str, object]


class UnsupportedDask(Exception):
    """This release of `distributed` lacks an attribute that this package uses."""


def check_scheduler(scheduler: Scheduler) -> None:
    """Raise UnsupportedDask unless a scheduler has all attributes that this module uses."""
    _check(scheduler, _SCHEDULER)


def check_worker(worker: Worker) -> None:
    """Raise UnsupportedDask unless a worker has all attributes that this module uses."""
    _check(worker, _WORKER)


def _check(server: object, names: Iterable[str]) -> None:
    missing = [name for name in names if not hasattr(server, name)]
    if missing:
        raise UnsupportedDask(
            f"distributed {distributed.__version__} has no {type(server).__name__}.{missing[0]};"
            f" tested are {TESTED[0]} to {TESTED[1]}"
        )


def extension(server: Scheduler | Worker, name: str) -> object | None:
    """Return what `extend` attached to a scheduler or worker."""
    return cast(_ServerInternals, server).extensions.get(name)


def extend(server: Scheduler | Worker, name: str, part: object, operations: Mapping[str, Operation]) -> None:
    """Attach an object to a scheduler or worker for its lifetime, and register the object's methods as operations.

    The operations do not keep the object. Dask keeps each operation that was ever called in a cache
    (`distributed.core._expects_comm`), also after the scheduler or worker has closed.
    """
    inside = cast(_ServerInternals, server)
    inside.extensions[name] = part
    for operation, method in operations.items():
        inside.handlers[operation] = _weak(method)


def retract(server: Scheduler | Worker, name: str) -> None:
    """Detach the object that `extend` attached."""
    cast(_ServerInternals, server).extensions.pop(name, None)


def _weak(method: Operation) -> Operation:
    target = weakref.WeakMethod(method)

    async def operation(*args: object, **fields: object) -> object:
        found = target()
        if found is None:
            raise OSError("it is closing")
        return await found(*args, **fields)

    # Dask passes the connection to operations whose signature begins with `comm`.
    operation.__signature__ = inspect.signature(method)  # type: ignore[attr-defined]
    return operation


def is_missing_module(text: str) -> bool:
    """Return whether Dask's text of an exception, its `repr()`, is that of a missing Python module."""
    return text.partition("(")[0] == "ModuleNotFoundError"


def tls_of_client() -> tuple[ssl.SSLContext | None, bool]:
    """Return the TLS context of a client, and whether encryption is required, from Dask's configuration.

    Raises:
        OSError, ValueError, TypeError: the settings are invalid.
    """
    args = cast(_SecuritySettings, _Security()).get_connection_args("client")
    context = args.get("ssl_context")
    return context if isinstance(context, ssl.SSLContext) else None, bool(args.get("require_encryption"))


async def open_client(scheduler: Scheduler, name: str) -> Client:
    """Connect a Dask client to a scheduler in the same process, with the scheduler's TLS settings."""
    inside = cast(_SchedulerInternals, scheduler)
    client = distributed.Client(
        inside.address,
        asynchronous=True,
        security=_client_security(inside.security),
        set_as_default=False,
        name=name,
    )
    return cast(Client, await client)


def _client_security(security: _SecuritySettings | None) -> _SecuritySettings | None:
    """Return a scheduler's TLS settings for a client of it; the scheduler's certificate is the fallback."""
    if security is None or not security.tls_scheduler_cert:
        return security
    return cast(
        _SecuritySettings,
        _Security(
            tls_ca_file=security.tls_ca_file,
            tls_ciphers=security.tls_ciphers,
            tls_client_cert=security.tls_client_cert or security.tls_scheduler_cert,
            tls_client_key=security.tls_client_key or security.tls_scheduler_key,
            require_encryption=security.require_encryption,
        ),
    )


async def wait(client: Client, future: Future) -> None:
    """Wait until a future is no longer pending."""
    with client.as_current():
        await distributed.wait([future])


async def call_worker(scheduler: Scheduler, worker: str, operation: str, /, **fields: object) -> object:
    """Call an operation of a worker; raises OSError, or the operation's own exception."""
    return await getattr(cast(_SchedulerInternals, scheduler).rpc(worker), operation)(**fields)


async def call_scheduler(worker: Worker, operation: str, /, **fields: object) -> object:
    """Call an operation of a worker's scheduler; raises OSError, or the operation's own exception."""
    return await getattr(cast(_WorkerInternals, worker).scheduler, operation)(**fields)


async def connect_to_worker(scheduler: Scheduler, worker: str, timeout: float) -> Comm:
    """Open a connection from a scheduler to a worker that passes payloads on unread; raises OSError."""
    args = cast(_SchedulerInternals, scheduler).connection_args
    return cast(Comm, await _connect(worker, timeout=timeout, deserialize=False, **args))


def current_worker() -> Worker:
    """Return the worker that runs the current task."""
    return cast(Worker, distributed.get_worker())


def resources_of(worker: Worker) -> Mapping[str, float]:
    """Return the amount of each resource of a worker."""
    return cast(_WorkerInternals, worker).state.total_resources


class _Stream(Protocol):
    def writing(self) -> bool: ...

    async def write(self, data: bytes) -> None: ...


async def drained(comm: Comm) -> None:
    """Wait until all data written to a connection is flushed, so that at most one message is buffered.

    Dask offers no such wait. A connection without a Tornado stream buffers as much as Dask permits.

    Raises:
        OSError: the connection broke.
    """
    stream = cast("_Stream | None", getattr(comm, "stream", None))
    if stream is not None and stream.writing():
        await stream.write(b"")
