"""OLMo's ``config.yaml``, to a transformers configuration and back.

Only the ``model`` section is read. Missing keys take the defaults of OLMo's own ``ModelConfig``;
a key whose effect transformers' classes cannot reproduce is refused by name and value.

A ``config.json`` of model type ``hf_olmo`` (DataDecide, the first OLMo repositories) holds the same
keys beside transformers' own; OLMo's code, which such repositories ask to run, is not needed.

==========================================  ==================================================
norms                                       class of transformers that computes the same
==========================================  ==================================================
layer norm without weights                  OLMo
RMS with weights, before the block          Llama (OLMo's ladder, DataDecide)
RMS with weights, after, and of q and k     OLMo-2
==========================================  ==================================================
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from ke_ray.errors import CheckpointError, ConfigError, UnsupportedArchitectureError
from ke_ray.storage import parse_json
from ke_ray.storage.safe_yaml import parse_yaml

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_FILE_LIMIT = 16 * 2**20  # bytes of a config.yaml; those with all data paths have about 0.2 MiB
_SECTION_LIMIT = 64 * 2**10
_INT_LIMIT = 2**31
_MAX_LAYERS = 65_536
# Keys of OLMo's ModelConfig that do not change what a trained model computes.
_HARMLESS = re.compile(
    r"init_.*|.*_init_std|scale_emb_init|.*_dropout|flash_attention|precision|rope_full_precision"
    r"|alibi_bias_max"
)
# Key: what it must be, and OLMo's own default where the key is absent.
_REQUIRED: dict[str, tuple[tuple[Any, ...], Any]] = {
    "activation_type": (("swiglu",), "swiglu"),
    "alibi": ((False, None), False),
    "rope": ((True,), False),
    "include_bias": ((False,), True),
    "block_type": (("sequential",), "sequential"),
    "block_group_size": ((1, None), 1),
    "scale_logits": ((False, None), False),
    "embedding_layer_norm": ((False, None), False),
}
_OLMO1: dict[str, tuple[tuple[Any, ...], Any]] = {
    "layer_norm_type": (("default", "low_precision", "amd_compatible"), "default"),
    "layer_norm_with_affine": ((False,), True),
    "attention_layer_norm": ((False, None), False),
    "layer_norm_eps": ((1e-5,), 1e-5),
}
_LLAMA: dict[str, tuple[tuple[Any, ...], Any]] = {
    "layer_norm_type": (("rms",), "default"),
    "layer_norm_with_affine": ((True,), True),
    "attention_layer_norm": ((False, None), False),
    "bias_for_layer_norm": ((False, None), None),
    "clip_qkv": ((None,), None),
}
_OLMO2: dict[str, tuple[tuple[Any, ...], Any]] = {
    "layer_norm_type": (("rms",), "default"),
    "layer_norm_with_affine": ((True,), True),
    "attention_layer_norm": ((True,), False),
    "attention_layer_norm_with_affine": ((True,), True),
    "bias_for_layer_norm": ((False, None), None),
    "clip_qkv": ((None,), None),
}
_RULES = {"olmo": _OLMO1, "llama": _LLAMA, "olmo2": _OLMO2}
_READ = {
    *("d_model", "n_heads", "n_layers", "n_kv_heads", "multi_query_attention", "mlp_hidden_size"),
    *("mlp_ratio", "vocab_size", "embedding_size", "max_sequence_length", "rope_theta"),
    *("eos_token_id", "pad_token_id", "weight_tying", "clip_qkv", "norm_after", "layer_norm_eps"),
    *("attention_layer_norm_with_affine", "bias_for_layer_norm"),
    *_REQUIRED,
    *_OLMO1,
    *_OLMO2,
}
# What transformers adds to a config.json.
_OF_TRANSFORMERS = {
    *("architectures", "auto_map", "dtype", "model_type", "tie_word_embeddings", "torch_dtype"),
    *("transformers_version", "use_cache", "_name_or_path"),
}

_Kind = Literal["olmo", "llama", "olmo2"]


@dataclass(frozen=True)
class NativeConfig:
    """What ke_ray needs of a native configuration.

    ``d_mlp`` is the number of memories of a layer (half of OLMo's ``mlp_hidden_size`` under
    SwiGLU), ``vocab_size`` the number of rows of the embedding (OLMo's ``embedding_size``).
    """

    model_type: _Kind
    d_model: int
    n_heads: int
    n_kv_heads: int
    n_layers: int
    d_mlp: int
    vocab_size: int
    max_sequence_length: int
    rope_theta: float
    norm_eps: float
    tied: bool
    eos_token_id: int | None
    pad_token_id: int | None
    clip_qkv: float | None = None

    @property
    def d_kv(self) -> int:
        """Width of keys and values, all heads together."""
        return self.d_model // self.n_heads * self.n_kv_heads

    def to_transformers(self) -> PreTrainedConfig:
        """The OlmoConfig, LlamaConfig or Olmo2Config of the same model."""
        from transformers import LlamaConfig, Olmo2Config, OlmoConfig

        shared: dict[str, Any] = {
            "vocab_size": self.vocab_size,
            "hidden_size": self.d_model,
            "intermediate_size": self.d_mlp,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "max_position_embeddings": self.max_sequence_length,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "eos_token_id": self.eos_token_id,
            "pad_token_id": self.pad_token_id,
            "tie_word_embeddings": self.tied,
        }
        if self.model_type == "olmo":
            return OlmoConfig(**shared, clip_qkv=self.clip_qkv, architectures=["OlmoForCausalLM"])
        shared["rms_norm_eps"] = self.norm_eps
        if self.model_type == "llama":
            return LlamaConfig(**shared, architectures=["LlamaForCausalLM"])
        return Olmo2Config(**shared, architectures=["Olmo2ForCausalLM"])

    @classmethod
    def from_transformers(cls, config: PreTrainedConfig) -> NativeConfig:
        """The native form of an OLMo or OLMo-2 configuration.

        Raises:
            UnsupportedArchitectureError: another architecture, or a setting OLMo's format lacks.
        """
        if config.model_type not in ("olmo", "olmo2"):
            raise UnsupportedArchitectureError(
                f"OLMo's native layout holds only OLMo and OLMo-2 models, not "
                f"'{config.model_type}'; save it with layout='hf'."
            )
        rope = config.rope_parameters or {}
        for name, value, expected in (
            ("attention_bias", bool(config.attention_bias), False),
            ("hidden_act", config.hidden_act, "silu"),
            ("rope_type", rope.get("rope_type", "default"), "default"),
            (
                "head_dim",
                getattr(config, "head_dim", None)
                or config.hidden_size // config.num_attention_heads,
                config.hidden_size // config.num_attention_heads,
            ),
        ):
            if value != expected:
                raise UnsupportedArchitectureError(
                    f"OLMo's native layout cannot express {name}={value!r} (only {expected!r}); "
                    "save it with layout='hf'."
                )
        eos = config.eos_token_id
        return cls(
            model_type=config.model_type,
            d_model=config.hidden_size,
            n_heads=config.num_attention_heads,
            n_kv_heads=config.num_key_value_heads,
            n_layers=config.num_hidden_layers,
            d_mlp=config.intermediate_size,
            vocab_size=config.vocab_size,
            max_sequence_length=config.max_position_embeddings,
            rope_theta=float(rope.get("rope_theta", 10_000.0)),
            norm_eps=getattr(config, "rms_norm_eps", 1e-5),
            tied=bool(config.tie_word_embeddings),
            eos_token_id=eos[0] if isinstance(eos, list) else eos,
            pad_token_id=config.pad_token_id,
            clip_qkv=getattr(config, "clip_qkv", None),
        )

    def to_yaml(self) -> str:
        """A ``config.yaml`` from which OLMo builds the same model."""
        second = self.model_type == "olmo2"
        model = {
            "d_model": self.d_model,
            "n_heads": self.n_heads,
            "n_kv_heads": self.n_kv_heads,
            "n_layers": self.n_layers,
            "mlp_hidden_size": 2 * self.d_mlp,
            "weight_tying": self.tied,
            "alibi": False,
            "rope": True,
            "rope_theta": self.rope_theta,
            "clip_qkv": self.clip_qkv,
            "flash_attention": False,
            "attention_dropout": 0.0,
            "residual_dropout": 0.0,
            "embedding_dropout": 0.0,
            "include_bias": False,
            "block_type": "sequential",
            "activation_type": "swiglu",
            "layer_norm_type": "rms" if second else "default",
            "layer_norm_with_affine": second,
            "layer_norm_eps": self.norm_eps,
            "bias_for_layer_norm": False,
            "attention_layer_norm": second,
            "attention_layer_norm_with_affine": second,
            "norm_after": second,
            "max_sequence_length": self.max_sequence_length,
            "vocab_size": self.vocab_size,
            "embedding_size": self.vocab_size,
            "eos_token_id": self.eos_token_id,
            "pad_token_id": self.pad_token_id,
            "init_device": "cpu",
        }
        return yaml.safe_dump({"model": model}, sort_keys=False)


def read_native_config(path: str | Path) -> NativeConfig:
    """Read a ``config.yaml``.

    Raises:
        CheckpointError: absent, too large or malformed.
        UnsupportedArchitectureError: it describes a model that transformers does not reproduce.
    """
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(f"'{file}' is missing.")
    if file.stat().st_size > _FILE_LIMIT:
        raise CheckpointError(f"'{file}' has more than {_FILE_LIMIT:,} bytes; is it a config?")
    try:
        return parse_native_config(file.read_text("utf-8"), origin=str(file))
    except UnicodeDecodeError as error:
        raise CheckpointError(f"'{file}' is not UTF-8 text: {error}.") from error


def read_hf_olmo_config(path: str | Path) -> NativeConfig | None:
    """Read a ``config.json`` of model type ``hf_olmo``; None where it is another file.

    Raises:
        CheckpointError, UnsupportedArchitectureError: as ``read_native_config``.
    """
    file = Path(path)
    if not file.is_file() or file.stat().st_size > _FILE_LIMIT:
        return None
    try:
        values = parse_json(file.read_bytes())
    except ValueError:
        return None
    if not isinstance(values, dict) or values.get("model_type") != "hf_olmo":
        return None
    own = {key: value for key, value in values.items() if key not in _OF_TRANSFORMERS}
    return _checked(own, origin=str(file))


def parse_native_config(text: str, *, origin: str = "config.yaml") -> NativeConfig:
    """Parse the text of a ``config.yaml``; see :func:`read_native_config`."""
    return _checked(_model_section(text, origin), origin)


def _checked(values: Mapping[str, Any], origin: str) -> NativeConfig:
    model_type: _Kind = "olmo"
    if values.get("norm_after"):
        model_type = "olmo2"
    elif values.get("layer_norm_type") == "rms":
        model_type = "llama"
    rules = _REQUIRED | _RULES[model_type]
    kind = {"olmo": "OLMo", "llama": "Llama", "olmo2": "OLMo-2"}[model_type]
    for key, (allowed, default) in rules.items():
        value = values.get(key, default)
        if key == "layer_norm_eps" and value is not None:
            value = _number(values, key, default, origin)
        if value not in allowed:
            raise UnsupportedArchitectureError(
                f"{origin}: {key}={value!r} cannot be reproduced by the {kind} class of "
                f"transformers, expected {' or '.join(map(repr, allowed))}."
            )
    for key, value in values.items():
        if key not in _READ and value and not _HARMLESS.fullmatch(str(key)):
            raise UnsupportedArchitectureError(
                f"{origin}: ke_ray does not know the key {key}={value!r} of OLMo's model "
                "configuration and cannot reproduce its effect."
            )
    return _build(values, model_type, origin)


def _build(values: Mapping[str, Any], model_type: _Kind, origin: str) -> NativeConfig:
    def integer(key: str, default: int | None = None, least: int = 1) -> int:
        value = values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < _INT_LIMIT:
            raise CheckpointError(f"{origin}: {key}={value!r}, expected an integer >= {least}.")
        return value

    d_model, n_heads = integer("d_model"), integer("n_heads")
    multi_query = values.get("multi_query_attention")
    n_kv_heads = integer("n_kv_heads", 1 if multi_query is True else n_heads)
    if multi_query is True and n_kv_heads != 1:
        raise CheckpointError(
            f"{origin}: multi_query_attention is set, but n_kv_heads={n_kv_heads}."
        )
    if d_model % (2 * n_heads) or n_heads % n_kv_heads:
        raise CheckpointError(
            f"{origin}: d_model={d_model} must be an even multiple of n_heads={n_heads}, and "
            f"n_heads a multiple of n_kv_heads={n_kv_heads}."
        )
    if values.get("mlp_hidden_size") is None:
        hidden = _number(values, "mlp_ratio", 4, origin) * d_model
    else:
        hidden = integer("mlp_hidden_size")
    if hidden % 2 or not 2 <= hidden < _INT_LIMIT:
        raise CheckpointError(f"{origin}: the MLP has width {hidden}, SwiGLU needs an even one.")
    vocab_size = integer("vocab_size")
    rows = integer("embedding_size", vocab_size) if "embedding_size" in values else 50_304
    if rows < vocab_size:
        raise CheckpointError(
            f"{origin}: embedding_size={rows} is smaller than vocab_size={vocab_size}."
        )
    tied = values.get("weight_tying", True)
    if not isinstance(tied, bool):
        raise CheckpointError(f"{origin}: weight_tying={tied!r}, expected true or false.")
    if (n_layers := integer("n_layers")) > _MAX_LAYERS:
        raise CheckpointError(f"{origin}: n_layers={n_layers:,}, expected {_MAX_LAYERS:,} at most.")
    clip = None
    if values.get("clip_qkv") is not None:
        clip = _number(values, "clip_qkv", None, origin)
    return NativeConfig(
        model_type=model_type,
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        n_layers=n_layers,
        d_mlp=int(hidden) // 2,
        vocab_size=rows,
        max_sequence_length=integer("max_sequence_length", 1024),
        rope_theta=_number(values, "rope_theta", 10_000.0, origin),
        norm_eps=_number(values, "layer_norm_eps", 1e-5, origin),
        tied=tied,
        eos_token_id=_token_id(values, "eos_token_id", rows, origin),
        pad_token_id=_token_id(values, "pad_token_id", rows, origin),
        clip_qkv=clip,
    )


def _token_id(values: Mapping[str, Any], key: str, rows: int, origin: str) -> int | None:
    value = values.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < rows:
        raise CheckpointError(f"{origin}: {key}={value!r} is not a token id below {rows:,}.")
    return value


def _number(values: Mapping[str, Any], key: str, default: Any, origin: str) -> float:
    value = values.get(key)
    value = default if value is None else value
    try:
        number = float(value) if not isinstance(value, bool) else float("nan")
    except (TypeError, ValueError, OverflowError):
        number = float("nan")
    if not 0 < number < float("inf"):
        raise CheckpointError(f"{origin}: {key}={value!r}, expected a positive number.")
    return number


def _model_section(text: str, origin: str) -> dict[str, Any]:
    # The rest of the file lists every data file of the run; parsing it would take seconds.
    match = re.search(r"^model:[^\n]*\n(?:(?:[ \t#][^\n]*)?(?:\n|\Z))*", text, re.M)
    section = match.group(0) if match else text
    if len(section) > _SECTION_LIMIT:
        raise CheckpointError(f"{origin}: no 'model' section of at most {_SECTION_LIMIT:,} bytes.")
    try:
        loaded = parse_yaml(section, origin)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    model = loaded.get("model") if isinstance(loaded, dict) else None
    if not isinstance(model, dict):
        raise CheckpointError(f"{origin} has no 'model' section; expected OLMo's configuration.")
    return {str(key): value for key, value in model.items()}
