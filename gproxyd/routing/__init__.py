"""Where a request goes.

providers     a provider at work: its faces, its credentials, what it is allowed
credentials   the keys of a provider, used in turn; a refused one is parked
names         a model's name -> provider and upstream model
breaker       whether a target is worth another attempt: closed, open, half-open
health        what is known of targets, and outlives configurations: breakers, rest, speed
retries       what a failure means, how long to wait, how many further attempts there may be
latency       how long targets take until their first byte
throttle      a queue before an upstream's limits
agents        names that stand for several models: what their targets are, which is asked first
plan          one request's attempts, as a generator
"""
