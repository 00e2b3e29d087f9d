"""What an administrator asks and changes over HTTP, and what callers ask about themselves.

house      what these rooms need of the daemon, and what a handler is given
forms      bodies and parameters: their shapes, and what is wrong with them
people     users and keys from the files and from the database, as one
views      how users, keys, money and records look as JSON
changes    users and keys are made, changed and deleted
usage      what was used, as rows, sums or CSV
logs       envelopes of requests, and the audit trail
operations providers, models, reload, explain
settings   the running configuration without its secrets
feed       finished requests, for those who listen
events     the same as a stream of server-sent events
me         what callers may know of themselves
api        the table of routes, and one place for their errors
"""
