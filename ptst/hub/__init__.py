"""Where model files come from: hub ids, the embedded model inside a wheel, GGUF conversion."""
