"""One process takes over from another without a gap: the old one starts the new one on its own sockets.

What they say to each other, a line of JSON each, over a socket of their own:

    new                      old
    {"ask": "limits"}
                             {"limits": TEXT}        what rate limits have counted
    {"ask": "accounts"}
                             {"accounts": {NAME: [since, spent, held]}, "places": {"OWNER GLOB": [requests, tokens]}};
                                                     from here on it tells what it books, and what changes of these
    {"ready": PID}                                   it serves; or
    {"failed": TEXT}                                 why it cannot, and then it ends
                             {"main": true}          the service manager knows; the old one serves nobody new
                             {"names": [NAME, ...], "nano": N, "held": {NAME: N}, "places": {...}}, for every request
                                                     that ends, also in a process that the old one has taken over from
                             {"places": {"OWNER GLOB": [requests, tokens]}}, when others have changed

Invariants: until `ready` the old process changes nothing, so a new one that fails costs nothing; whatever the old one
does not say, the new one does without: then it knows what the database knows. Money that the old process books after
it told of its accounts is told exactly once; what a request has held is told to be free before the last bytes of its
answer leave. The end of the conversation means that the other process is gone.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import orjson

from gproxyd.errors import GproxydError, Refusal
from gproxyd.host.systemd import ROLES, Role, Sockets, adopt
from gproxyd.policy.limits import NOTHING, Held, Limiter
from gproxyd.policy.quotas import Hold, Quotas
from gproxyd.types import UsageRecord

READY_WITHIN = 60.0
"""Seconds that a new process gets until it serves."""

ANSWER_WITHIN = 5.0
"""Seconds that the old one gets for an answer."""

LOOK_EVERY = 0.1
"""Seconds between two looks of the old one at who holds places: of requests that begin nobody tells it."""

_LONGEST = 64 * 2**20
"""Bytes of a message; rate limits of many keys are the longest."""

_SOCKETS, _CHANNEL = "GPROXYD_INHERITED_SOCKETS", "GPROXYD_PREDECESSOR"

# The shell is gone as soon as it has started the new process, which so becomes a child of the service manager's at
# once: a manager hears only of its own children when they end.
_APART = ("/bin/sh", "-c", '"$@" &', "sh")

Watchers = list[Callable[[UsageRecord], None]]


class HandOverFailed(GproxydError):
    """No other process took over; this one goes on as if nothing had been."""


class _Channel:
    """Lines of JSON, both ways."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def over(cls, sock: socket.socket) -> _Channel:
        return cls(*await asyncio.open_unix_connection(sock=sock, limit=_LONGEST))

    def say(self, message: Mapping[str, Any]) -> None:
        if not self._writer.is_closing():
            self._writer.write(orjson.dumps(message) + b"\n")

    async def hear(self) -> dict[str, Any] | None:
        """The next message; None when the other process is gone, or says what nobody understands."""
        try:
            message = orjson.loads(await self._reader.readline())
        except (OSError, ValueError):
            return None
        return message if isinstance(message, dict) else None

    async def end(self) -> None:
        """Says what is left to say, and closes."""
        self._writer.close()
        try:
            async with asyncio.timeout(ANSWER_WITHIN):
                await self._writer.wait_closed()
        except OSError:  # TimeoutError is one, too
            return

    def close(self) -> None:
        self._writer.close()


class Successor:
    """The old process's side. `pid` is the new one's, once it serves; `before` the one that the old one has taken over
    from, which may have streams to end, too."""

    def __init__(self, quotas: Quotas, limiter: Limiter, watchers: Watchers, before: Predecessor | None) -> None:
        self._quotas = quotas
        self._limiter = limiter
        self._watchers = watchers
        self._before = before
        self._channel: _Channel | None = None
        self._places = _Places(limiter)
        self._looking: asyncio.Task[None] | None = None
        self.pid = 0

    async def take_over(self, environ: Mapping[str, str], sockets: Sequence[tuple[Role, int]]) -> int:
        """Starts this very command anew and returns its pid once it serves. Raises HandOverFailed."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                _start(environ, sockets, theirs)
            except OSError as error:
                ours.close()
                raise HandOverFailed(f"no other process could be started: {error.strerror}") from error
        self._channel = await _Channel.over(ours)
        try:
            async with asyncio.timeout(READY_WITHIN):
                self.pid = await self._until_ready(self._channel)
        except TimeoutError:
            self.give_up(signal.SIGKILL)
            raise HandOverFailed(f"the new process did not serve within {READY_WITHIN:.0f} s") from None
        except HandOverFailed:
            self.give_up(signal.SIGKILL)
            raise
        return self.pid

    async def _until_ready(self, channel: _Channel) -> int:
        while True:
            message = await channel.hear()
            if message is None:
                raise HandOverFailed("the new process ended before it served; its lines in the log say why")
            if "failed" in message:
                raise HandOverFailed(f"the new process cannot serve: {message['failed']}")
            if "ready" in message:
                return int(message["ready"])
            self.pid = int(message.get("pid", self.pid))
            asked = message.get("ask")
            if asked == "limits":
                channel.say({"limits": self._limiter.dump().decode()})
            elif asked == "accounts":
                channel.say({"accounts": _accounts(self._quotas), "places": self._places.look()})
                self._begin_to_tell()

    def give_up(self, number: signal.Signals) -> None:
        """Whatever was started goes, by that signal; what it was told is forgotten with it."""
        if self._looking is not None:
            self._looking.cancel()
            self._watchers.remove(self._tell)
            if self._before is not None:
                self._before.relay = None
        assert self._channel is not None
        self._channel.close()
        if self.pid:
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                self.pid = 0

    def say_main(self) -> None:
        """The new process is the one that counts."""
        assert self._channel is not None
        self._channel.say({"main": True, "places": self._places.look()})

    async def close(self) -> None:
        """The last word: this process is at its end, and all it had booked is told."""
        if self._looking is not None:
            self._looking.cancel()
        if self._channel is not None:
            await self._channel.end()

    def _begin_to_tell(self) -> None:
        self._watchers.append(self._tell)
        if self._before is not None:
            self._before.relay = self._say
        self._looking = asyncio.get_running_loop().create_task(self._keep_looking())

    def _tell(self, record: UsageRecord) -> None:
        self._say([f"user:{record.user}", f"key:{record.user}/{record.key}"], record.cost_nanousd or 0)

    def _say(self, names: Sequence[str], nano: int) -> None:
        """A request of these accounts is over, and has cost so much."""
        accounts = self._quotas.accounts()
        held = {name: accounts[name].held for name in names if name in accounts}
        assert self._channel is not None
        self._channel.say({"names": list(held), "nano": nano, "held": held, "places": self._places.changed(names)})

    async def _keep_looking(self) -> None:
        assert self._channel is not None
        while True:
            await asyncio.sleep(LOOK_EVERY)
            if changed := self._places.look():
                self._channel.say({"places": changed})


class _Places:
    """What has been told of the places and tokens that running requests hold."""

    def __init__(self, limiter: Limiter) -> None:
        self._limiter = limiter
        self._told: dict[str, dict[str, Held]] = {}  # by owner, then by "OWNER GLOB"

    def look(self) -> dict[str, Held]:
        """What is held otherwise than was told, in all; it counts as told from here on."""
        for name in self._limiter.all_held():
            self._told.setdefault(name.partition(" ")[0], {}).setdefault(name, NOTHING)
        return self.changed(tuple(self._told))

    def changed(self, owners: Iterable[str]) -> dict[str, Held]:
        """The same of some owners, as far as anything of theirs was held at the last look."""
        found: dict[str, Held] = {}
        for owner in owners:
            known = self._told.get(owner, {})
            for name, before in tuple(known.items()):
                if (now := self._limiter.held(name)) != before:
                    known[name] = found[name] = now
                if now == NOTHING:
                    del known[name]
            if not known:
                self._told.pop(owner, None)
        return found


def _start(environ: Mapping[str, str], sockets: Sequence[tuple[Role, int]], channel: socket.socket) -> None:
    """Raises OSError."""
    descriptors = [channel.fileno(), *(descriptor for _, descriptor in sockets)]
    told = {
        _CHANNEL: str(channel.fileno()),
        _SOCKETS: " ".join(f"{role}={descriptor}" for role, descriptor in sockets),
    }
    shell = os.posix_spawn(
        _APART[0],
        [*_APART, *_command()],
        {**environ, **told},
        # Onto itself: the copy is the one that the new program inherits.
        file_actions=[(os.POSIX_SPAWN_DUP2, descriptor, descriptor) for descriptor in descriptors],
        setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],
        setsigmask=[],
    )
    os.waitpid(shell, 0)


def _command() -> list[str]:
    """What this process was started with; by its program's own name, if that can be started, so that it keeps it."""
    program = sys.argv[0]
    if os.path.isabs(program) and os.access(program, os.X_OK):
        return [program, *sys.argv[1:]]
    return [sys.executable, *sys.orig_argv[1:]]


def _accounts(quotas: Quotas) -> dict[str, tuple[float, int, int]]:
    return {
        name: (quotas.since(account.period), quotas.spent(account), account.held)
        for name, account in quotas.accounts().items()
    }


class Predecessor:
    """The new process's side. `sockets` are what it was given to listen on; `gone` is set when the old one is."""

    def __init__(self, channel: socket.socket, sockets: Sockets) -> None:
        self._socket = channel
        self._voice = channel.dup()  # which works before there is a loop, and when there is none any more
        self._channel: _Channel | None = None
        self._listening: asyncio.Task[None] | None = None
        self._holds: dict[str, Hold] = {}
        self._main = asyncio.Event()
        self.relay: Callable[[Sequence[str], int], None] | None = None  # hears of what the old process books
        self.sockets = sockets
        self.gone = asyncio.Event()

    @classmethod
    def take(cls, environ: MutableMapping[str, str]) -> Predecessor | None:
        """Where this process was started by another one to take over from it. The environment forgets it.

        Raises OSError for a socket that is none.
        """
        channel, given = environ.pop(_CHANNEL, ""), environ.pop(_SOCKETS, "")
        if not channel:
            return None
        sockets: dict[Role, list[socket.socket]] = {}
        for word in given.split():
            name, _, descriptor = word.partition("=")
            for role in ROLES:
                if name == role:
                    sockets.setdefault(role, []).append(adopt(int(descriptor), name))
        os.set_inheritable(int(channel), False)
        return cls(socket.socket(fileno=int(channel)), sockets)

    def refuse(self, why: str) -> None:
        """This process cannot serve; the old one goes on."""
        try:
            self._voice.sendall(orjson.dumps({"failed": why}) + b"\n")
        except OSError:
            return  # nobody is there any more who would want to know

    async def limits(self) -> bytes | None:
        """What rate limits have counted in the old process."""
        told = (await self._ask("limits")).get("limits")
        return told.encode() if isinstance(told, str) else None

    async def accounts(self, quotas: Quotas, limiter: Limiter) -> None:
        """Has the accounts know what they have spent, and both what requests of the old process hold."""
        told = await self._ask("accounts")
        known = quotas.accounts()
        limiter.hold_elsewhere(told.get("places", {}))
        for name, (since, spent, held) in told.get("accounts", {}).items():
            account = known.get(name)
            if account is not None and quotas.since(account.period) == since:
                quotas.tell(name, account.period, spent)
                self._hold(quotas, name, held)

    async def serve(self, quotas: Quotas, limiter: Limiter) -> None:
        """Tells the old process that this one serves; returns when it is the one that counts."""
        if self._channel is None:
            return
        self._voice.close()
        self._listening = asyncio.get_running_loop().create_task(self._listen(self._channel, quotas, limiter))
        self._channel.say({"ready": os.getpid()})
        try:
            async with asyncio.timeout(ANSWER_WITHIN):
                await self._main.wait()
        except TimeoutError:
            return  # it hangs; this process serves already, and two that serve are better than none

    async def _ask(self, what: str) -> dict[str, Any]:
        if self._channel is None:
            self._channel = await _Channel.over(self._socket)
        self._channel.say({"ask": what, "pid": os.getpid()})
        try:
            async with asyncio.timeout(ANSWER_WITHIN):
                return await self._channel.hear() or {}
        except TimeoutError:
            return {}

    async def _listen(self, channel: _Channel, quotas: Quotas, limiter: Limiter) -> None:
        try:
            while (message := await channel.hear()) is not None:
                if message.get("main"):
                    self._main.set()
                limiter.hold_elsewhere(message.get("places", {}))
                known = quotas.accounts()
                names = [name for name in message.get("names", ()) if name in known]
                quotas.charge([known[name] for name in names], message.get("nano", 0))
                for name in names:
                    self._hold(quotas, name, message.get("held", {}).get(name, 0))
                if names and self.relay is not None:
                    self.relay(names, message.get("nano", 0))
        finally:
            limiter.free_elsewhere()
            for hold in self._holds.values():
                hold.release()
            if self.relay is not None:
                self.relay(list(self._holds), 0)
            self._main.set()
            self.gone.set()
            channel.close()

    def _hold(self, quotas: Quotas, name: str, nano: int) -> None:
        if (before := self._holds.pop(name, None)) is not None:
            before.release()
        account = quotas.accounts().get(name)
        if account is None or not nano:
            return
        left = quotas.remaining(account)
        try:
            self._holds[name] = quotas.reserve([account], nano if left is None else min(nano, left))
        except Refusal:
            return  # nothing is left that could be held

    def close(self) -> None:
        """Listens no longer."""
        if self._listening is not None:
            self._listening.cancel()
