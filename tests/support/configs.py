"""Configurations that differ in little."""

from __future__ import annotations

from collections.abc import Mapping

_CONFIG = """\
server: {{listen: ["127.0.0.1:0"]{server}}}
streams: {{keepalive: {keepalive}}}
providers:
{providers}
users: {{tester: {{role: admin, keys: {{main: {{credential: client-key}}}}}}}}
{more}"""

_PROVIDER = """\
  {name}:
    vendor: openai
    base_url: "{url}"
    credentials: [provider-key]
    timeouts: {{connect: {connect}, first_byte: {first_byte}, idle: {idle}}}
"""


def providers_at(
    urls: Mapping[str, str],
    *,
    connect: str,
    first_byte: str,
    idle: str,
    keepalive: str = "15s",
    server: str = "",
    more: str = "",
) -> str:
    """A configuration: a provider of the vendor `openai` for each name and address, and one administrator.

    connect, first_byte, idle  the timeouts of all providers
    keepalive                  of streams; else the default
    server, more               further settings of `server`; further lines
    """
    timeouts = {"connect": connect, "first_byte": first_byte, "idle": idle}
    providers = "".join(_PROVIDER.format(name=name, url=url, **timeouts) for name, url in urls.items())
    listen = f", {server}" if server else ""
    return _CONFIG.format(providers=providers, keepalive=keepalive, server=listen, more=more)
