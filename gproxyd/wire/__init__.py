"""Bytes in, bytes or events out; no socket, no clock, no task.

operations   what can be asked of the gateway: the table of endpoints
target       a raw request target -> form, provider, operation, model, what goes upstream
headers      which header lines cross the gateway, and which never do
http1        an HTTP/1.1 client's side of a connection, on llhttp
inject       members put into a JSON object that its sender left out
multipart    the `model` field of a form that is never held whole
pick         a few top-level members out of a JSON text of any length
outline      what routing needs to know of a JSON body, however large
splice       the model's name replaced in JSON, every other byte kept
sse          where events end, and how one is written
transform    what a response passes through on its way to the client
"""
