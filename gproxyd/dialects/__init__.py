"""What OpenAI, Anthropic and Gemini call the same things.

usage      the tokens that a reply tells, and what a request asks for
meter      reads usage out of what passes by; hides the event that only the gateway asked for
dialect    per dialect, as data: the places of a model's name, errors, error events, pings
"""
