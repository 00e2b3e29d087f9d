"""What OpenAI, Anthropic and Gemini call the same things.

dialect    per dialect, as data: the places of a model's name, errors, error events, pings
"""
