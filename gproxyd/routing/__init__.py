"""Where a request goes.

providers     a provider at work: its faces, its credentials, what it is allowed
credentials   the keys of a provider, used in turn; a refused one is parked
names         a model's name -> provider and upstream model
"""
