"""gproxyd: a reverse proxy that stands between LLM clients and LLM vendors.

The rooms, from the ground up; imports only descend:

    errors, types, units       what everybody may use
    wire                       bytes in, bytes or events out: targets, HTTP/1.1, SSE, splicing
    dialects                   what OpenAI, Anthropic and Gemini call the same things
    config, secrets, vendors   what the administrator wrote, and what vendors are
    policy, routing, upstream, observe
                               who calls, where to, over which connection, what is told about it
    gateway                    one request from the door to its last byte
    host                       the embedded scripted vendor
    daemon                     the composition root: the only place that wires rooms together
    cli                        the commands
"""

__version__ = "0.1.0"
