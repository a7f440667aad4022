"""Models behind an OpenAI-compatible API: addresses and keys, requests and their replies, which are paid for once."""
