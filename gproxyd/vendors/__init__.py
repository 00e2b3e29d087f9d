"""What vendors are, as data.

vendors.yaml   base URLs, faces, where the key goes, what counts as a refused key
catalogue      reads it
models.yaml    limits, list prices, capabilities of models
models         reads it
prices         what tokens cost, in whole nano-dollars
auth           the one place where a provider's credential is put on a request
"""
