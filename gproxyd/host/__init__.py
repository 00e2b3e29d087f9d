"""The machine that the daemon runs on, and what the daemon's rooms have in common.

demo         the embedded scripted vendor
state        what outlives the process: opened, saved, pruned
house        the daemon as it is administered
explaining   what administrators are shown; decisions: what would become of a request
discovering  asks vendors for their models; asking: one such question
figures      /statsz and /metrics; profiles: /debug/pprof
systemd      notify, watchdog, sockets that were handed over
listeners    sockets, opened here or given
handoff      another process takes over the sockets, the money and the counts
leaving      parting with clients
"""
