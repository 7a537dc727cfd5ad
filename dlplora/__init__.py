"""Dynamic LoRA fusion: train experts and routers, fuse adapters, compare methods under identical settings."""

__version__ = "0.2.0"
