"""Profiles of the running daemon, as `go tool pprof` opens them.

serving   /debug/pprof/: the index, one profile at a time, as profile.proto or as text
answers   what the HTTP layer gets: an answer, or a refusal
proto     samples put together, and written as profile.proto or text
stacks    frames -> function, file and line; nothing else of a frame leaves this room
cpu       CPU time by stack, by timers on the threads' own CPU clocks
heap      what is on the heap, by type; what was allocated in a window, by stack
tasks     every asyncio task by its await chain, every thread by its stack
stalls    when the event loop stood still, and where
waits     waits for locks, pools, queues and executors, told by whoever waited
"""
