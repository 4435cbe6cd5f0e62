"""The address that a server listens at."""

from __future__ import annotations

import ipaddress
import socket
import sys

from jaxsp.errors import UserError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Names of this machine that no other one reaches."""


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, which nobody else listens at.

    Args:
      host: name or address.
      port: number; 0 for any that is free.

    Raises:
      UserError: it can't be had.

    Example:
      >>> found = bind("127.0.0.1", 0)
      >>> found.close()
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        if sys.platform != "win32":  # there it would let two servers have one port
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        found.listen(2048)
    except (OSError, UnicodeError) as error:
        found.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"The server can't listen at {host}:{port} ({reason}); choose another --port or --host."
        ) from error
    return found


def base_url(listener: socket.socket) -> str:
    """The address that clients are given as ``base_url``.

    Example:
      >>> with bind("127.0.0.1", 0) as listener:
      ...     base_url(listener).startswith("http://127.0.0.1:")
      True
    """
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address.

    Example:
      >>> is_loopback("localhost"), is_loopback("127.0.0.2"), is_loopback("0.0.0.0")
      (True, True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() in LOOPBACK
