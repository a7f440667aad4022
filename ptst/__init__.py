"""ptst: fine-tune chat models and measure what it does to their safety, under any pair of prompt templates."""

__version__ = "0.2.0"
