"""The front door's certificate."""

from __future__ import annotations

import ssl

from balancer.errors import InvalidInput
from balancer.serve.options import Options


def front_door(options: Options) -> ssl.SSLContext | None:
    """What the front door encrypts with, None where it does not; raises `InvalidInput` where that cannot be used."""
    if not options.cert_file:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(options.cert_file, options.key_file)
    except OSError as error:
        raise InvalidInput(f"the front door's certificate or key cannot be used: {error}") from None
    return context
