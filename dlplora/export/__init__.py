"""Export weighted adapters for other software: as one PEFT adapter, as a merged checkpoint, or as GGUF files."""
