"""Who calls, whether they may, how often, and for how much money.

callers       the table of keys, which key a request presents, and what its caller may do
permissions   globs over the names of models and endpoints
limits        rate limits: rules, and what a running request holds of them
windows       how much happened in the last so many seconds
standing      what is left of the limits, in the headers of each dialect
saved         windows as bytes, for a restart
quotas        money: accounts, and what a running request holds of them
"""
