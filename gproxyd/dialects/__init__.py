"""What OpenAI, Anthropic and Gemini call the same things.

usage      the tokens that a reply tells, and what a request asks for
meter      reads usage out of what passes by; hides the event that only the gateway asked for
dialect    per dialect, as data: the places of a model's name, errors, error events, pings
turns      the shapes of a conversation, and who speaks
conversation  what routing reads in one: what it sticks by, what it needs, how long it is
capabilities  what a request needs of a model
weight     how many tokens a conversation probably has
reasoning  whose encrypted thoughts a conversation bears
trim       a conversation cut to fit, no tool call without its result
prompt     a system prompt put in
rewrite    changed members put into a body, every other byte as it was
identity   the ids that replies make and requests ask for
quirks     a body as one vendor wants it, and what its answers mean
"""
