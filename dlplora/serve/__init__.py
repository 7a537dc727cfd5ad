"""An OpenAI-compatible server that routes each request to adapters of a pool and batches requests step by step."""
