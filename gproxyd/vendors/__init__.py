"""What vendors are, as data.

vendors.yaml   base URLs, faces, where the key goes, what counts as a refused key
catalogue      reads it
auth           the one place where a provider's credential is put on a request
"""
