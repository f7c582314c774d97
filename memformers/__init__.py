"""Memory for transformers: one way to carry, reset and save it."""
__version__ = "0.1.0"

from .data import ByteTokenizer, load_corpus
from .memory import carry, clone, load_memory, nbytes, reset, save_memory, select
from .model import MemoryLM, Reader, Step, generate, stream
from .transformer_xl import TransformerXL
