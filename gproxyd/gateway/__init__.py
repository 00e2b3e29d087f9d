"""One request, from the door to its last byte.

door        aiohttp's low-level server
doorstep    one client connection, with what aiohttp's own lacks
guard       aiohttp's parser's messages, looked over
lookout     whether a client is still there whose bytes are not read
fitness     whether what came through the door is spoken here
crowd       how many clients may be connected
handler     every request from its first byte to its last, and what becomes of its errors
lane        the short way, for requests of which nothing has to be waited for
admission   path, key, endpoint: who calls, and for what
snapshot    everything a request may need of one configuration, taken once at the door
call        what is known of a request: the log line in the making
route       where requests of one kind go: provider, face, upstream target
router      which of these a request takes, and whether its caller may
intake      the request's body: read whole where it names the model, else streamed
agents      names that stand for several models, under one configuration and catalogue
fitting     a request fitted to an agent's members: which can take it, how it reads for each
attempts    where a request may go, and what it holds while it does
walk        one request along its plan, attempt after attempt
exchange    an attempt at an upstream: connection, credential, request
trial       an answer held until it is known whether another target is to answer instead
homing      where responses, files and batches live
relay       the response, from the upstream's bytes into the client's transport
reading     what becomes of an answer's body on its way, and what it tells of tokens
downstream  the client's side: heads, framing, back-pressure, and how to end without looking complete
sent        what aiohttp is told of an answer that is on the wire already
listing     the models that a caller sees
shelves     what can be called, laid out for it
refusal     the gateway's own errors on the wire
people      everybody who may call, from the files and from the database
desk        what the gateway answers itself
envelopes   what client and vendor said, for those who want it kept
books       what is written of a request when it is over
"""
