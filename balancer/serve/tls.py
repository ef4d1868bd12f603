"""The front door's certificate."""

from __future__ import annotations

import ssl
from typing import Any

from balancer.errors import InvalidInput
from balancer.serve.options import Options

_HANDSHAKE_S = 5.0
"""A client that has not shaken hands by then goes: until then it is none that `Limits.connections` counts."""


def front_door(options: Options) -> dict[str, Any]:
    """What `loop.create_server` is told of encryption, nothing where there is none; raises `InvalidInput` where the
    certificate or its key cannot be used."""
    if not options.cert_file:
        return {}
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(options.cert_file, options.key_file)
    except OSError as error:
        raise InvalidInput(f"the front door's certificate or key cannot be used: {error}") from None
    # It counts while a slow client still reads its answer, and so is no shorter than what that one has without TLS.
    return {"ssl": context, "ssl_handshake_timeout": _HANDSHAKE_S, "ssl_shutdown_timeout": options.limits.write_s}
