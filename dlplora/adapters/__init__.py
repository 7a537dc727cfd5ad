"""Adapters on disk: read, check, list and add PEFT LoRA folders; pools and their manifests."""
