"""One request, from the door to its last byte.

door        aiohttp's low-level server with what it lacks
crowd       how many clients may be connected
handler     admission: path, key, endpoint; then one of the rooms below; always a log line
snapshot    everything a request may need of one configuration, taken once at the door
call        what is known of a request: the log line in the making
route       operation and model -> provider, face, upstream target
intake      the request's body: read whole where it names the model, else streamed
exchange    attempts at an upstream: connection, credential, request
relay       the response, from the upstream's bytes into the client's transport
downstream  the client's side: heads, framing, back-pressure, and how to end without looking complete
sent        what aiohttp is told of an answer that is on the wire already
listing     the models that a caller sees
refusal     the gateway's own errors on the wire
"""
