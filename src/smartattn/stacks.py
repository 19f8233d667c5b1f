"""Whose layers are known to treat every token by itself, attention aside, and where they are.

Taking the padding out of a stack of layers is exact only if nothing but attention looks at a
token's neighbours, and if positions enter through what the layers are handed. Both are facts about
the code of a layer that cannot be read off a module, so that a stack is recognised by its class in
Transformers, and each class here was compared with its padded self: ``python -m
tests.padding_free_sweep``.
"""

from __future__ import annotations

import enum
import functools
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

#: Classes whose forward runs the layers, as ``folder.Class`` below ``transformers.models``.
STACKS = frozenset(
    [
        "afmoe.AfmoeModel",
        "albert.AlbertTransformer",
        "apertus.ApertusModel",
        "apertus1p5.Apertus1p5TextModel",
        "arcee.ArceeModel",
        "aria.AriaTextModel",
        "axk1.AXK1Model",
        "bert.BertEncoder",
        "biogpt.BioGptModel",
        "bitnet.BitNetModel",
        "camembert.CamembertEncoder",
        "cohere.CohereModel",
        "cohere2.Cohere2Model",
        "cohere2_moe.Cohere2MoeModel",
        "ctrl.CTRLModel",
        "cwm.CwmModel",
        "data2vec.Data2VecTextEncoder",
        "dbrx.DbrxModel",
        "deepseek_v2.DeepseekV2Model",
        "deepseek_v3.DeepseekV3Model",
        "diffllama.DiffLlamaModel",
        "distilbert.Transformer",
        "dots1.Dots1Model",
        "electra.ElectraEncoder",
        "emu3.Emu3TextModel",
        "ernie.ErnieEncoder",
        "ernie4_5.Ernie4_5Model",
        "ernie4_5_moe.Ernie4_5_MoeModel",
        "esmc.EsmcModel",
        "eurobert.EuroBertModel",
        "exaone4.Exaone4Model",
        "exaone_moe.ExaoneMoeModel",
        "flex_olmo.FlexOlmoModel",
        "gemma.GemmaModel",
        "gemma2.Gemma2Model",
        "gemma3.Gemma3TextModel",
        "glm.GlmModel",
        "glm4.Glm4Model",
        "glm4_moe.Glm4MoeModel",
        "glm4_moe_lite.Glm4MoeLiteModel",
        "gpt2.GPT2Model",
        "gpt_bigcode.GPTBigCodeModel",
        "gpt_neox.GPTNeoXModel",
        "granite.GraniteModel",
        "granitemoe.GraniteMoeModel",
        "granitemoeshared.GraniteMoeSharedModel",
        "gte.GteModel",
        "helium.HeliumModel",
        "hunyuan_v1_dense.HunYuanDenseV1Model",
        "hunyuan_v1_moe.HunYuanMoEV1Model",
        "hy_v3.HYV3Model",
        "hyperclovax.HyperCLOVAXModel",
        "jais2.Jais2Model",
        "jetmoe.JetMoeModel",
        "jina_embeddings_v3.JinaEmbeddingsV3Model",
        "kolibri1.Kolibri1Model",
        "laguna.LagunaModel",
        "llama.LlamaModel",
        "mellum.MellumModel",
        "minicpm3.MiniCPM3Model",
        "minimax_m2.MiniMaxM2Model",
        "ministral.MinistralModel",
        "ministral3.Ministral3Model",
        "mistral.MistralModel",
        "mistral4.Mistral4Model",
        "mixtral.MixtralModel",
        "modernbert.ModernBertModel",
        "modernbert_decoder.ModernBertDecoderModel",
        "nanochat.NanoChatModel",
        "nemotron.NemotronModel",
        "nomic_bert.NomicBertModel",
        "olmo.OlmoModel",
        "olmo2.Olmo2Model",
        "olmo3.Olmo3Model",
        "olmoe.OlmoeModel",
        "opt.OPTDecoder",
        "persimmon.PersimmonModel",
        "phi.PhiModel",
        "phi3.Phi3Model",
        "qwen2.Qwen2Model",
        "qwen2_moe.Qwen2MoeModel",
        "qwen3.Qwen3Model",
        "qwen3_moe.Qwen3MoeModel",
        "roberta.RobertaEncoder",
        "roberta_prelayernorm.RobertaPreLayerNormEncoder",
        "seed_oss.SeedOssModel",
        "smollm3.SmolLM3Model",
        "solar_open.SolarOpenModel",
        "stablelm.StableLmModel",
        "starcoder2.Starcoder2Model",
        "ultrabert.UltrabertModel",
        "vaultgemma.VaultGemmaModel",
        "xlm_roberta.XLMRobertaEncoder",
        "xlm_roberta_xl.XLMRobertaXLEncoder",
        "youtu.YoutuModel",
    ]
)

#: What the normalisation after the last layer is called where a stack has one.
_FINAL_NORMS = (
    "norm",
    "ln_f",
    "final_layer_norm",
    "final_layernorm",
    "final_norm",
    "layer_norm",
)
#: Where a word begins in the name of a class.
_BOUNDARY = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
#: Parts of layers that make packing inexact, by what their classes or attributes are called.
_OBSTACLES: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("relative_attention_bias", "relativeposition", "alibi"),
        "a relative position bias is computed for padded positions",
    ),
    (
        ("mamba", "_ssm", "conv1d", "shortconv", "linearattention", "gateddeltanet", "recurrent"),
        "state-space, recurrent and convolution layers mix neighbouring tokens",
    ),
)


class Head(enum.Enum):
    """What the code after the stack does with its output, as far as padding positions matter."""

    #: Nothing, or a pooler that reads the first token.
    NONE = "none"
    #: The prediction of a token is compared with the label of the next one.
    NEXT_TOKEN = "next token"
    #: The prediction of a token is compared with its own label.
    TOKEN = "token"
    #: One token is picked: the first (encoders) or the last one that is not padding (decoders).
    SEQUENCE = "sequence"


_HEADS = (
    ("ForCausalLM", Head.NEXT_TOKEN),
    ("LMHeadModel", Head.NEXT_TOKEN),
    ("ForMaskedLM", Head.TOKEN),
    ("ForTokenClassification", Head.TOKEN),
    ("ForSequenceClassification", Head.SEQUENCE),
    ("DoubleHeadsModel", None),
    ("Model", Head.NONE),
)


@dataclass(frozen=True, eq=False)
class Stack:
    """The parts of a model that hooks go to.

    Args:
        root: the model that was given.
        base: the innermost model of Transformers around the layers: it collects hidden states.
        module: the module whose forward runs the layers.
        layers: those layers, each one once.
        norm: the normalisation after the last layer, or None.
    """

    root: PreTrainedModel
    base: PreTrainedModel
    module: nn.Module
    layers: tuple[nn.Module, ...]
    norm: nn.Module | None
    head: Head

    @property
    def name(self) -> str:
        """Class name of the model that was given."""
        return type(self.root).__name__

    @property
    def has_windows(self) -> bool:
        """Some layer may see a window of tokens alone."""
        config = self.base.config
        kinds = getattr(config, "layer_types", None) or ()
        return bool(getattr(config, "sliding_window", None)) or "sliding_attention" in kinds

    @functools.cached_property
    def features(self) -> frozenset[str]:
        """Arguments of attention that not every backend implements, see ``Call.features``."""
        found = set()
        if getattr(self.base.config, "attn_logit_softcapping", None) is not None:
            found.add("softcap")
        if any(name.endswith("sinks") for name, _ in self.module.named_parameters()):
            found.add("s_aux")
        return frozenset(found)

    @property
    def depth(self) -> int:
        """How many layers a forward runs: ALBERT's are fewer, and run several times."""
        return max(len(self.layers), getattr(self.base.config, "num_hidden_layers", None) or 0)

    @property
    def weights(self) -> float:
        """How many numbers a token is multiplied by in a forward, those of all experts included."""
        total = sum(_weights(module) for layer in self.layers for module in layer.modules())
        return total * self.depth / len(self.layers)

    @property
    def pools_first_token(self) -> bool:
        """An output is made from the first position of each row, if the stack is an encoder."""
        return self.head is Head.SEQUENCE or getattr(self.base, "pooler", None) is not None


def find_stack(model: nn.Module) -> Stack:
    """The stack of a model.

    Raises:
        ValueError: padding cannot be taken out of this model; the message is one sentence.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{name} is no model of Transformers; give padding_free the model inside of it"
        )
    found = [(path, m) for path, m in model.named_modules() if qualified_name(m) in STACKS]
    if len(found) != 1:
        raise ValueError(f"{name}: {_obstacle(model, len(found))}")
    path, module = found[0]
    layers = tuple(_layers(module))
    if not layers:
        raise ValueError(f"{name}: its layers are not those of Transformers")
    base = model
    prefix: list[str] = []
    for part in path.split(".") if path else []:
        prefix.append(part)
        inner = model.get_submodule(".".join(prefix))
        if isinstance(inner, PreTrainedModel):
            base = inner
    norms = (getattr(module, attribute, None) for attribute in _FINAL_NORMS)
    norm = next((n for n in norms if isinstance(n, nn.Module)), None)
    return Stack(model, base, module, layers, norm, _head(model, module))


def qualified_name(module: nn.Module) -> str | None:
    """``folder.Class`` of a class that Transformers itself defines, else None."""
    parts = type(module).__module__.split(".")
    if parts[:2] != ["transformers", "models"] or len(parts) < 4:
        return None
    return f"{parts[2]}.{type(module).__name__}"


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """The names of the parameters of a module's forward that may be given by position."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(type(module).forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind in kinds)[1:]


def _weights(module: nn.Module) -> int:
    """Numbers of a module's own matrices; quantised ones hold several in one element."""
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    # Adapters repeat the sizes of the layer inside of them.
    if not module._modules and isinstance(sizes[0], int) and isinstance(sizes[1], int):
        return sizes[0] * sizes[1]
    return sum(p.numel() for p in module.parameters(recurse=False) if p.dim() > 1)


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """The layers of a stack, or nothing if some of them are of other origin."""
    source = type(module).__module__
    lists = [child for child in module.children() if isinstance(child, nn.ModuleList)]
    layers: dict[nn.Module, None] = {}
    for child in lists:
        for layer in child:
            # ALBERT: groups of layers, each run several times.
            inner = [m for m in layer.children() if isinstance(m, nn.ModuleList)]
            nested = len(inner) == 1 and not any(True for _ in layer.parameters(recurse=False))
            parts: Any = inner[0] if nested and len(list(layer.children())) == 1 else (layer,)
            layers.update(dict.fromkeys(parts))
    if any(type(layer).__module__ != source for layer in layers):
        return
    yield from layers


def _head(model: PreTrainedModel, module: nn.Module) -> Head:
    """What a model does after its stack; a model that only contains one is not known."""
    name, stack, root = type(model).__name__, qualified_name(module), qualified_name(model)
    if model is module:
        return Head.NONE
    if root is not None and stack is not None and root.split(".")[0] == stack.split(".")[0]:
        for suffix, head in _HEADS:
            if name.endswith(suffix):
                if head is None:
                    break
                return head
    raise ValueError(f"{name}: it is not known what it does with padding positions of its stack")


def _obstacle(model: PreTrainedModel, found: int) -> str:
    if found > 1:
        return f"it has {found} stacks of layers; give padding_free one of them"
    if getattr(model.config, "is_encoder_decoder", False):
        return "cross-attention reads padding positions of another stack"
    if getattr(model.config, "alibi", False) or model.config.model_type in ("bloom", "mpt"):
        return _OBSTACLES[0][1]
    for module in model.modules():
        given = [type(module).__name__, *module._modules]
        # In words as well: there is no "ssm" in a GptOssModel.
        names = [name.lower() for name in given]
        names += ["_" + _BOUNDARY.sub("_", name).lower() for name in given]
        for words, sentence in _OBSTACLES:
            if any(word in name for word in words for name in names):
                return sentence
    return "its layers are not among those known to treat every token by itself"
