"""Connections to upstreams: HTTP/1.1 with keep-alive, over TCP or TLS, directly or through a proxy.

connection   one connection: a request out, its response into a sink, in the same turn of the loop
dial         how a connection comes to be: DNS, TCP, CONNECT, TLS
pool         idle connections per origin
deadlines    one clock for all that can wait too long
"""
