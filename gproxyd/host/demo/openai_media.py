"""OpenAI's images and audio: JSON or multipart in, JSON, text or bytes out.

Shapes: OpenAI API reference, "Images" and "Audio". Uploaded files are answered with their length and hash, so that
whoever sent them can tell whether they arrived whole.
"""

from __future__ import annotations

import base64
import hashlib
import struct
import zlib
from collections.abc import Iterator
from functools import partial

from gproxyd.host.demo.answers import Answer, Object, VendorError, plain, pretty, sse, stream
from gproxyd.host.demo.call import CREATED, Call
from gproxyd.host.demo.openai_chat import openai_error_event
from gproxyd.host.demo.script import count

_SPEECH_BYTES = 4096
_SPEECH_TYPES = {
    "mp3": "audio/mpeg",
    "opus": "audio/opus",
    "aac": "audio/aac",
    "flac": "audio/flac",
    "wav": "audio/wav",
    "pcm": "audio/pcm",
}


def _png() -> bytes:
    """The smallest picture there is: one orange pixel (PNG, third edition, section 5)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\0\xff\x80\x00")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


PNG = _png()


def generate_images(call: Call) -> Answer:
    """POST /v1/images/generations."""
    body = call.json()
    call.model(body)
    if not body.get("prompt"):
        raise VendorError(400, "Missing required parameter: 'prompt'.", param="prompt")
    return _images(str(body["prompt"]), int(body.get("n") or 1), body.get("response_format") == "url")


def rework_images(call: Call) -> Answer:
    """POST /v1/images/edits and /variations; the revised prompt tells what was uploaded."""
    call.known_model(call.form_value("model"))
    files = call.files()
    if not files:
        raise VendorError(400, "Missing required parameter: 'image'.", param="image")
    told = "; ".join(f"{part.size} bytes, sha256 {part.sha256}" for part in files)
    prompt = f"{call.form_value('prompt', 'a variation')} ({told})"
    return _images(prompt, int(call.form_value("n", "1")), call.form_value("response_format") == "url")


def transcribe(call: Call) -> Answer:
    """POST /v1/audio/transcriptions and /translations, in the format asked for."""
    part = call.part("file")
    model = call.known_model(call.form_value("model"))
    text = f"{part.size} bytes, sha256 {part.sha256}"
    if call.form_value("stream") == "true":
        return stream(_transcript_events(call, text), partial(openai_error_event, call))
    shape = call.form_value("response_format", "json")
    if shape == "text":
        return plain(f"{text}\n".encode(), "text/plain; charset=utf-8")
    if shape in {"srt", "vtt"}:
        return plain(_subtitles(shape, text), "text/plain; charset=utf-8")
    told: Object = {"text": text, "model": model, "usage": {"type": "duration", "seconds": 1}}
    if shape == "verbose_json":
        told |= {"task": call.path.rsplit("/", 1)[-1].rstrip("s"), "language": "english", "duration": 1.0}
        told["segments"] = []
    return pretty(told)


def speak(call: Call) -> Answer:
    """POST /v1/audio/speech: bytes that depend on the request alone, of no announced length."""
    body = call.json()
    call.model(body)
    if not body.get("input"):
        raise VendorError(400, "Missing required parameter: 'input'.", param="input")
    size = _SPEECH_BYTES if call.controls.size is None else call.controls.size
    sound = hashlib.shake_256(call.ident("").encode()).digest(size)
    return plain(sound, _SPEECH_TYPES.get(body.get("response_format") or "mp3", "audio/mpeg"), chunked=True)


def _images(prompt: str, copies: int, as_url: bool) -> Answer:
    where: Object = (
        {"url": "https://demo.invalid/pixel.png"} if as_url else {"b64_json": base64.b64encode(PNG).decode()}
    )
    spent = count(prompt)
    usage = {
        "input_tokens": spent,
        "input_tokens_details": {"text_tokens": spent, "image_tokens": 0},
        "output_tokens": 16 * copies,
        "total_tokens": spent + 16 * copies,
    }
    return pretty({"created": CREATED, "data": [where | {"revised_prompt": prompt}] * copies, "usage": usage})


def _subtitles(shape: str, text: str) -> bytes:
    if shape == "vtt":
        return f"WEBVTT\n\n00:00:00.000 --> 00:00:01.000\n{text}\n".encode()
    return f"1\n00:00:00,000 --> 00:00:01,000\n{text}\n".encode()


def _transcript_events(call: Call, text: str) -> Iterator[bytes]:
    for word in text.split(" "):
        yield sse({"type": "transcript.text.delta", "delta": word + " "}, call.eol())
    tokens = count(text)
    usage = {"type": "tokens", "input_tokens": 10, "output_tokens": tokens, "total_tokens": 10 + tokens}
    yield sse({"type": "transcript.text.done", "text": text, "usage": usage}, call.eol())
    yield sse(b"[DONE]", call.eol())
