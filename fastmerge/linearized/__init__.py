"""Fine-tuning that is linear in its parameters (L-LoRA), so that its experts merge linearly."""
