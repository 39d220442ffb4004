"""minids: DeepSeek-V3 and R1, the papers, executable.

Rooms, in reading order: config, model, checkpoint, data, train, infer. A file imports only from the rooms before its own.
The two names below are loaded on first use, so that ``import minids`` costs next to nothing.
"""

__version__ = "0.1.0"
__all__ = ["ModelConfig", "Transformer"]


def __getattr__(name: str):
    if name == "ModelConfig":
        from minids.config import ModelConfig

        return ModelConfig
    if name == "Transformer":
        from minids.model.transformer import Transformer

        return Transformer
    raise AttributeError(f"module 'minids' has no attribute {name!r}; it offers {', '.join(__all__)}")
