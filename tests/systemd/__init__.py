"""Tests under a real systemd, booted for them in namespaces of its own."""
