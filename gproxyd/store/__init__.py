"""What outlives the process, in one file of SQLite and a folder of spool files.

errors     what can go wrong with it
schema     the tables, and how an older file becomes a newer one
opening    a file found, judged, mended or moved aside, before anybody uses it
database   one writer and one reader, whole transactions only
spool      records on disk before they are in the database
booking    records from the spool into the tables, counted once
ledger     one record per request, never lost and never in the way
reports    what was used, by whom, and what it cost
people     users and keys made through the admin API, their credits, the audit trail, saved counters
homes      id -> the provider that made it: responses, files, batches
logs       envelopes of requests, for those who ask for them
"""
