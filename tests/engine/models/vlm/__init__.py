"""Vision-language models without weights and with."""
