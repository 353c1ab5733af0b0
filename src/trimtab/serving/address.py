"""The address a server listens on."""

from __future__ import annotations

import errno
import socket

from trimtab.errors import ConfigError

BACKLOG = 2048  # connections that may wait to be accepted


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; raises ConfigError with what is wrong with the address."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError):
        raise ConfigError(f"host is {host!r}, which is no known address; try 127.0.0.1 or 0.0.0.0") from None
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        reasons = {
            errno.EADDRINUSE: f"port {port} on {host} is in use; choose another with --port (0: a free one)",
            errno.EACCES: f"port {port} is not for this user; choose one of at least 1024 with --port",
            errno.EADDRNOTAVAIL: f"host is {host!r}, which is no address of this machine; try 127.0.0.1",
        }
        fallback = f"cannot listen on {host}, port {port}: {error.strerror}"
        raise ConfigError(reasons.get(error.errno or 0, fallback)) from None
    return sock


def url_of(sock: socket.socket, path: str = "") -> str:
    """The address that a listening socket is reached at from this machine."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, str(host))
    return f"http://{f'[{host}]' if ':' in host else host}:{port}{path}"


def is_local(sock: socket.socket) -> bool:
    """Whether a listening socket is reached from this machine alone."""
    host = sock.getsockname()[0]
    return host.startswith("127.") or host == "::1"
