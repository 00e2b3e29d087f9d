"""Who calls, and whether they may.

callers   the table of keys, and which key a request presents
"""
