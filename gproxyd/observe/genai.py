"""What OpenTelemetry calls what we do: its semantic conventions for generative AI (status: development).

https://opentelemetry.io/docs/specs/semconv/gen-ai/
"""

from __future__ import annotations

OPERATIONS = {
    "chat": "chat",
    "messages": "chat",
    "responses": "chat",
    "generate": "generate_content",
    "completions": "text_completion",
    "embeddings": "embeddings",
}
"""Endpoint -> gen_ai.operation.name; what is missing is no inference. Responses have no name of their own there."""

_PROVIDERS = {
    "azure": "azure.ai.openai",
    "bedrock": "aws.bedrock",
    "gemini": "gcp.gemini",
    "mistral": "mistral_ai",
    "moonshot": "moonshot_ai",
    "vertex": "gcp.vertex_ai",
    "xai": "x_ai",
}
"""Vendor -> gen_ai.provider.name, where the well-known name is another one."""


def provider_name(vendor: str, provider: str) -> str:
    """gen_ai.provider.name: the vendor's, or the provider's own name where no vendor is known."""
    return _PROVIDERS.get(vendor, vendor or provider)
