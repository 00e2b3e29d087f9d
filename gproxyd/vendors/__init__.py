"""What vendors are, as data.

vendors.yaml   base URLs, faces, where the key goes, quirks, what counts as a refused key
catalogue      reads it
models.yaml    limits, list prices, capabilities of models
models         reads it
prices         what tokens cost, in whole nano-dollars
discovery      how vendors list their models
offers         what providers offer: configured, discovered and known, merged
auth           the one place where a provider's credential is put on a request
oauth          tokens that are fetched with the key of a Google service account
"""
