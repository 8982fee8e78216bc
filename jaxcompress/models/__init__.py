"""Reference models in Flax Linen, and how checkpoints become them.

model = load("path-or-hub-name")         # Model: apply(params, ids), params, blocks, config
generate(model, prompt_ids, 32)
take_layers(model, [0, 1, 5])
"""

from jaxcompress.models.blocks import (
    stack_layers,
    take_layers,
    unstack_layers,
    with_scan_layers,
)
from jaxcompress.models.config import ModelConfig
from jaxcompress.models.convolution import ConvNetConfig
from jaxcompress.models.decoder_config import DecoderConfig
from jaxcompress.models.encoder import EncoderConfig
from jaxcompress.models.families import (
    FAMILIES,
    Family,
    abstract_params,
    build_model,
    family_of,
    from_state_dict,
    functions_of,
    linear_paths,
    logical_axes,
    model_from_tensors,
    name_map_of,
)
from jaxcompress.models.functions import Functions
from jaxcompress.models.generate import generate, quantize_kv_cache
from jaxcompress.models.gpt2 import GPT2Config
from jaxcompress.models.loading import find_checkpoint, load, to_checkpoint_tensors
from jaxcompress.models.lstm import LSTMConfig
from jaxcompress.models.mobilenet import MobileNetConfig
from jaxcompress.models.names import NameMap, Parameter
from jaxcompress.models.resnet import ResNetConfig
from jaxcompress.models.rope import RopeConfig
from jaxcompress.models.stock import stock_form
from jaxcompress.models.tokenizer import Tokenizer
from jaxcompress.models.transformer_decoder import TransformerDecoderConfig
from jaxcompress.models.tying import share_layers, unshare_layers, untie
from jaxcompress.models.vgg import VGGConfig, vgg_layers

__all__ = [
    "FAMILIES",
    "ConvNetConfig",
    "DecoderConfig",
    "EncoderConfig",
    "Family",
    "Functions",
    "GPT2Config",
    "LSTMConfig",
    "MobileNetConfig",
    "ModelConfig",
    "NameMap",
    "Parameter",
    "ResNetConfig",
    "RopeConfig",
    "Tokenizer",
    "TransformerDecoderConfig",
    "VGGConfig",
    "abstract_params",
    "build_model",
    "family_of",
    "find_checkpoint",
    "from_state_dict",
    "functions_of",
    "generate",
    "linear_paths",
    "load",
    "logical_axes",
    "model_from_tensors",
    "name_map_of",
    "quantize_kv_cache",
    "share_layers",
    "stack_layers",
    "stock_form",
    "take_layers",
    "to_checkpoint_tensors",
    "unshare_layers",
    "unstack_layers",
    "untie",
    "vgg_layers",
    "with_scan_layers",
]
