"""SmolVLM, SmolVLM2 and Idefics3."""
