"""Whether a host is this machine itself, which the service and the reading room answer without a password."""

import ipaddress
from urllib.parse import urlsplit


def is_loopback(host: str) -> bool:
    """Of a host as it is given, or as a request calls it."""
    try:
        name = host if host.count(":") > 1 and host[0] != "[" else urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
