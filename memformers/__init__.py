"""Memory for transformers: one way to carry, reset and save it."""
__version__ = "0.1.0"

from .associative import AssociativeTransformer
from .block_recurrent import BlockRecurrentTransformer
from .compressive import CompressiveTransformer
from .data import ByteTokenizer, load_corpus
from .feedback import FeedbackTransformer
from .files import load_memory, save_memory
from .infini import InfiniTransformer
from .knn_memory import KNNMemory, KNNMemoryList
from .memorizing import KNNAttention, MemorizingTransformer
from .memory import carry, cast, clone, nbytes, reset, select
from .memory_transformer_xl import MemoryTransformerXL
from .neural_memory import NeuralMemoryTransformer
from .gated_delta import GatedDeltaNet
from .generate import Reader, generate, stream
from .model import MemoryLM, Step
from .packages import fetch_package
from .recurrent_memory import RecurrentMemoryTransformer
from .transformer_xl import TransformerXL
from .wrapper import AutoregressiveWrapper
