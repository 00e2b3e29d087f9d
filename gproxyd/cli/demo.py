"""`gproxyd demo`: the gateway in front of an embedded scripted vendor, with a ready key. Needs nothing."""

from __future__ import annotations

import asyncio
import signal
import tempfile
from pathlib import Path

import uvloop

from gproxyd import daemon
from gproxyd.daemon import Daemon, Places
from gproxyd.gateway.snapshot import Snapshot
from gproxyd.host.demo import DemoVendor

KEY = "sk-admin-1"
VENDOR_KEY = "sk-demo-vendor"

_CONFIG = """\
server: {{listen: ["127.0.0.1:{port}"]}}
endpoints:
  {{files: openai-main, batches: openai-main, images: openai-main, audio: openai-main, embeddings: openai-main,
    moderations: openai-main, rerank: openai-main, completions: openai-main, responses: openai-main, a2a: openai-main}}
providers:
  openai-main:
    vendor: openai
    base_url: {vendor}
    credentials: [demo]
    models:
      - {{id: gpt-4.1-mini, context: 1047576, max_output: 32768, price: {{input: "0.40", output: "1.60"}}}}
      - {{id: text-embedding-3-small, context: 8191, price: {{input: "0.02"}}}}
  anthropic-main:
    vendor: anthropic
    base_url: {vendor}
    credentials: [demo]
    models: [{{id: claude-3-5-sonnet-latest, context: 200000, max_output: 8192}}]
  vertex-main:
    vendor: gemini
    base_url: {vendor}
    credentials: [demo]
    models: [{{id: gemini-1.5-flash, context: 1048576, max_output: 8192}}]
aliases:
  chat-default: openai-main/gpt-4.1-mini
users:
  admin: {{role: admin, keys: {{default: {{credential: admin-key}}}}}}
"""

_WELCOME = """\
gproxyd demo: http://{address} (stop it with Ctrl-C)
An embedded, scripted vendor answers; nothing leaves this machine. Paste any of these into another terminal:

OpenAI chat, then the same as a stream, by alias:
curl http://{address}/v1/chat/completions -H "Authorization: Bearer {key}" -H "Content-Type: application/json" -d \
'{{"model":"openai-main/gpt-4.1-mini","messages":[{{"role":"user","content":"Say hello in one short sentence."}}]}}'
curl -N http://{address}/v1/chat/completions -H "Authorization: Bearer {key}" -H "Content-Type: application/json" -d \
'{{"model":"chat-default","stream":true,"messages":[{{"role":"user","content":"Hello"}}]}}'

Anthropic messages, then streamed, with the provider in the path:
curl http://{address}/v1/messages -H "x-api-key: {key}" -H "anthropic-version: 2023-06-01" \
-H "Content-Type: application/json" -d '{{"model":"anthropic-main/claude-3-5-sonnet-latest","max_tokens":256,\
"messages":[{{"role":"user","content":"Hello"}}]}}'
curl -N http://{address}/anthropic-main/v1/messages -H "x-api-key: {key}" -H "anthropic-version: 2023-06-01" \
-H "Content-Type: application/json" -d '{{"model":"claude-3-5-sonnet-latest","max_tokens":256,"stream":true,\
"messages":[{{"role":"user","content":"Hello"}}]}}'

Gemini generateContent, then streamed:
curl "http://{address}/v1beta/models/vertex-main/gemini-1.5-flash:generateContent" -H "x-goog-api-key: {key}" \
-H "Content-Type: application/json" -d '{{"contents":[{{"parts":[{{"text":"Hello"}}]}}]}}'
curl -N "http://{address}/vertex-main/v1beta/models/gemini-1.5-flash:streamGenerateContent?alt=sse" \
-H "x-goog-api-key: {key}" -H "Content-Type: application/json" -d '{{"contents":[{{"parts":[{{"text":"Hello"}}]}}]}}'

The models, and whether the gateway is well:
curl http://{address}/v1/models -H "Authorization: Bearer {key}"
curl http://{address}/healthz
"""


def run(port: int) -> int:
    """Serves until Ctrl-C or SIGTERM."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(port))
    return 0


async def _serve(port: int) -> None:
    vendor = DemoVendor(keys=[VENDOR_KEY])
    with tempfile.TemporaryDirectory(prefix="gproxyd-demo-") as folder:
        environ = _write(Path(folder), port, await vendor.start())
        places = Places(Path(folder) / "gproxyd.db", None, Path(folder) / "gproxyd.yaml", environ)
        await _run(vendor, daemon.load(Path(folder) / "gproxyd.yaml", environ), places)


async def _run(vendor: DemoVendor, snapshot: Snapshot, places: Places) -> None:
    journal = daemon.journal_for(snapshot.config)
    loop = asyncio.get_running_loop()
    gateway = Daemon(snapshot, journal, loop, places)
    ending, hurry = asyncio.Event(), asyncio.Event()
    hurry.set()  # nobody waits for a demonstration
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    try:
        await gateway.start()
        print(_WELCOME.format(address=gateway.addresses[0], key=KEY), flush=True)
        await ending.wait()
        await gateway.drain(hurry)
    finally:
        await gateway.stop()
        await vendor.stop()
        journal.close()


def _write(folder: Path, port: int, vendor: str) -> dict[str, str]:
    """Configuration and secrets as an administrator would lay them out; returns the environment that finds them."""
    (folder / "gproxyd.yaml").write_text(_CONFIG.format(port=port, vendor=vendor), "utf-8")
    secrets = folder / "secrets"
    secrets.mkdir(mode=0o700)
    for name, value in (("demo", VENDOR_KEY), ("admin-key", KEY)):
        path = secrets / name
        path.touch(mode=0o600)
        path.write_text(value + "\n", "utf-8")
    return {"GPROXYD_SECRETS_DIR": str(secrets)}
