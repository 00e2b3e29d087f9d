"""What is told to the operator.

journal   log lines, written off the loop
native    the same for systemd's journal, each field by its name
otel      spans for OpenTelemetry, where that is wanted
genai     names that OpenTelemetry's conventions give
stats     what has been counted, and /statsz
histogram counts by size, and quantiles
metrics   the same for Prometheus
pprof     profiles of the running daemon
lag       how late the event loop is
"""
