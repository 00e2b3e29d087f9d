"""The embedded scripted vendor: a fake OpenAI, Anthropic and Gemini in one server.

`gproxyd demo` puts it behind the gateway, so that every example works without an account; the test suite uses it
as the upstream. Nothing in it is random: the same request gets the same bytes, ids are hashes of the request,
time stands still.

Modules, from the wire inwards: `server` (sockets, one record per request), `form` (multipart as it streams in),
`call` (one request, as the faces see it), `controls` (the headers below), `routes` (the table of paths), `script`
(what is said, whatever the dialect), the faces (`openai_chat`, `openai_responses`, `openai_json`, `openai_media`,
`openai_files`, `anthropic`, `gemini`, `models`, `a2a`), `errors` (the three dialects' error bodies), `answers`
and `send` (the way out).

What it serves
    OpenAI      /v1/chat/completions, /v1/completions, /v1/responses with its sub-paths, /v1/embeddings,
                /v1/moderations, /v1/rerank, /v1/images/*, /v1/audio/*, /v1/files, /v1/batches, /v1/models
    Anthropic   /v1/messages, /v1/messages/count_tokens, and /v1/models when `anthropic-version` is sent
    Gemini      /v1beta/models, and /v1/models when `x-goog-api-key` is sent; under both versions the verbs
                generateContent, streamGenerateContent, countTokens, embedContent, batchEmbedContents
    others      /v1/a2a[/{agent}], /.well-known/agent-card.json, and /v1/echo, which tells what it was sent

What it says
    - "Hello! You said: ..." with the first 200 characters of the last user message; a few prompts have answers of
      their own (`script.ANSWERS`). A request for structured output gets a value that fits its schema.
    - With tools: a call of one when the last user message has the word "weather" (two calls, if also the word
      "both") or when the tool choice forces it. Once the tool's result is there, "The tool answered: ...";
      a forced choice goes on calling.
    - Thoughts when the dialect's own switch asks for them, or when the model's name contains "reason".
    - One token is four bytes of text. A quarter of the prompt counts as read from cache (for Anthropic an eighth
      more as written to it). An answer longer than the token limit is cut, unless a control header sizes it.
    - Model "nope" does not exist, in every generation API. A request without messages is the vendor's 400.

Who may ask
    Without `keys`, everybody. With them, a request must carry one credential, no more, and it must be one of
    these; otherwise 401. A second credential beside the right one is refused too, since it is somebody else's.

Control headers; an unknown or unreadable one is answered 400
    x-demo-delay: MS            wait before the response head
    x-demo-event-delay: MS      wait between stream events
    x-demo-events: N            cut the streamed text into exactly N deltas
    x-demo-size: BYTES          pad the answer's text (for speech: the audio) to about that many bytes
    x-demo-status: CODE         answer with the vendor's error of that status, 400 to 599; 429 says `retry-after: 7`
    x-demo-fail-after: N|head   break off after N stream events, or N body bytes of a plain answer; `0` has sent
                                the response head, `head` has sent nothing at all
    x-demo-fail: close          ...by a FIN without the last chunk (the default)
                 reset          ...by a TCP reset
                 stall          ...by silence, until the peer leaves
                 error          ...by the dialect's error event, then a regular end (plain answers: as `close`)
                                `x-demo-fail` alone implies `x-demo-fail-after: 0`
    x-demo-chunk: N             re-cut the body into HTTP chunks of N bytes, whatever the events' borders
    x-demo-length: known        send Content-Length where the body would be chunked
    x-demo-eol: lf|crlf|cr      line ends of the event stream (default: the vendor's own)
"""

from __future__ import annotations

from gproxyd.host.demo.call import Seen
from gproxyd.host.demo.server import DemoVendor

__all__ = ["DemoVendor", "Seen"]
