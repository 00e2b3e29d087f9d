"""What the tests stand on: real daemons, real sockets, scripted upstreams."""
