"""The bench: gproxyd beside nginx and beside the usual aiohttp proxy, in one run.

    upstream   canned answers, far from being the bottleneck
    usual      the proxy that one would write first: aiohttp Application and ClientSession
    proxies    starts what is measured, pinned to one core; reads its CPU time and memory
    load       wrk for requests, an own client for streams
    run        the cases and the table (`make bench`)

Ratios of CPU time between programs in one run mean something; absolute times on a shared machine mean little.
"""
