"""Llama hyper-parameters: from config.json, and from a file's metadata; both checked by the same rules.

A config may ask for what we do not compute, and a file may be hostile: a message names the key as its reader
knows it, what was found and what was expected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from adaptrt.errors import AdaptrtError, ConvertError, ModelError
from adaptrt.model.architecture import Metadata


@dataclass(frozen=True)
class _Number:
    """A numeric hyper-parameter: its config.json key and its inclusive range."""

    config: str
    kind: type[int] | type[float]
    low: float
    high: float
    default: float | None = None  # transformers' own; None means config.json must have it


# By metadata key without the "llama." prefix. The limits, far above any model, keep products small integers.
_NUMBERS = {
    "block_count": _Number("num_hidden_layers", int, 1, 1024),
    "context_length": _Number("max_position_embeddings", int, 1, 1 << 24, 2048),
    "embedding_length": _Number("hidden_size", int, 1, 1 << 17),
    "feed_forward_length": _Number("intermediate_size", int, 1, 1 << 20),
    "attention.head_count": _Number("num_attention_heads", int, 1, 1024),
    "attention.head_count_kv": _Number("num_key_value_heads", int, 1, 1024),
    "attention.key_length": _Number("head_dim", int, 2, 1024),
    "attention.layer_norm_rms_epsilon": _Number("rms_norm_eps", float, 1e-30, 1.0, 1e-6),
    "rope.freq_base": _Number("rope_theta", float, 1.0, 1e15, 10000.0),
    "rope.dimension_count": _Number("head_dim", int, 2, 1024),
    "vocab_size": _Number("vocab_size", int, 1, 1 << 24),
}
_FLAGS = {
    "attention.bias": "attention_bias",
    "feed_forward.bias": "mlp_bias",
    "tie_word_embeddings": "tie_word_embeddings",
}
_SCALING_NUMBERS = {
    "rope.scaling.factor": _Number("factor", float, 1.0, 1e6),
    "rope.scaling.low_freq_factor": _Number("low_freq_factor", float, 1e-6, 1e6),
    "rope.scaling.high_freq_factor": _Number("high_freq_factor", float, 1e-6, 1e6),
    "rope.scaling.original_context_length": _Number("original_max_position_embeddings", int, 1, 1 << 24),
}
_SCALING_KEYS = {"linear": tuple(_SCALING_NUMBERS)[:1], "llama3": tuple(_SCALING_NUMBERS)}
_ALL_NUMBERS = _NUMBERS | _SCALING_NUMBERS

# Keys that change nothing here, whatever their value: training, bookkeeping, sampling defaults, output forms.
_INERT_NAMES = """
    _attn_implementation_autoset _commit_hash _flash_attn_2_enabled _name_or_path architectures
    attention_dropout attn_implementation bad_words_ids begin_suppress_tokens bos_token_id
    cache_implementation decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id gradient_checkpointing hidden_dropout id2label
    initializer_range is_decoder is_llama_config label2id length_penalty max_length max_sequence_length
    min_length name_or_path neftune_noise_alpha no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_attentions output_hidden_states output_scores pad_token_id prefix
    problem_type remove_invalid_values repetition_penalty resid_pdrop return_dict return_dict_in_generate
    sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss tokenizer_class top_k
    top_p torch_dtype torchscript transformers.js_config transformers_version typical_p unk_token_id
    unsloth_fixed unsloth_version use_bfloat16 use_cache
"""
_INERT = frozenset(_INERT_NAMES.split())
# Keys that this file or the importer reads (quantization_config belongs to the importer).
_READ = frozenset(
    {number.config for number in _NUMBERS.values()}
    | set(_FLAGS.values())
    | {
        "hidden_act",
        "model_type",
        "original_max_position_embeddings",
        "partial_rotary_factor",
        "pretraining_tp",
    }
    | {"quantization_config", "rope_parameters", "rope_scaling"}
)
_ROPE_READ = frozenset(
    {number.config for number in _SCALING_NUMBERS.values()}
    | {"rope_type", "rope_theta", "partial_rotary_factor"}
)
_ROPE_OUTSIDE = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class LlamaShape:
    """A file's checked hyper-parameters by plain names; `values` holds all of them by metadata key."""

    values: Mapping[str, Any]
    layers: int
    width: int
    feed_forward: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    vocab_size: int
    context_length: int
    attention_bias: bool
    mlp_bias: bool
    tied: bool

    @classmethod
    def read(cls, metadata: Metadata) -> LlamaShape:
        """Raises ModelError naming a missing, unknown or impossible key."""
        if metadata.get("general.architecture") != "llama":
            found = metadata.get("general.architecture")
            raise ModelError(f"metadata general.architecture is {_brief(found)}, expected 'llama'")
        values = {key[6:]: value for key, value in metadata.items() if key.startswith("llama.")}
        _check(values, lambda key: f"metadata llama.{key}", ModelError)
        return cls(
            values,
            values["block_count"],
            values["embedding_length"],
            values["feed_forward_length"],
            values["attention.head_count"],
            values["attention.head_count_kv"],
            values["attention.key_length"],
            float(values["attention.layer_norm_rms_epsilon"]),
            values["vocab_size"],
            values["context_length"],
            values["attention.bias"],
            values["feed_forward.bias"],
            values["tie_word_embeddings"],
        )


# Checks, shared by config.json and file metadata


def _check(values: Mapping[str, Any], label: Callable[[str], str], error: type[AdaptrtError]) -> None:
    """Refuse missing, unknown and impossible values; `label` names a key as the user knows it."""
    scaling = values.get("rope.scaling.type")
    if scaling is not None and (not isinstance(scaling, str) or scaling not in _SCALING_KEYS):
        names = " or ".join(_SCALING_KEYS)
        raise error(f"{label('rope.scaling.type')} is {_brief(scaling)}, expected none, {names}")
    numbers = (*_NUMBERS, *_SCALING_KEYS.get(scaling or "", ()))
    known = {*numbers, *_FLAGS, "rope.scaling.type"}
    for key in (*numbers, *_FLAGS):
        if key not in values:
            raise error(f"{label(key)} is missing")
        if key in _FLAGS and not isinstance(values[key], bool):
            raise error(f"{label(key)} is {_brief(values[key])}, expected true or false")
        if key in _ALL_NUMBERS:
            _check_number(values[key], _ALL_NUMBERS[key], label(key), error)
    for key in values:
        if key not in known:
            raise error(f"{label(key)} is not a key that a llama model of this kind has")
    _check_together(values, label, error)


def _check_number(value: object, number: _Number, label: str, error: type[AdaptrtError]) -> None:
    kinds = (int,) if number.kind is int else (int, float)
    if type(value) not in kinds or not number.low <= value <= number.high:  # type: ignore[operator]
        what = "a whole number" if number.kind is int else "a number"
        raise error(f"{label} is {_brief(value)}, expected {what} from {number.low:g} to {number.high:.12g}")


def _check_together(
    values: Mapping[str, Any], label: Callable[[str], str], error: type[AdaptrtError]
) -> None:
    """Rules between values, each known to be in range by itself."""
    heads, kv_heads = values["attention.head_count"], values["attention.head_count_kv"]
    if heads % kv_heads:
        raise error(
            f"{label('attention.head_count')} is {heads}, expected a multiple of "
            f"{label('attention.head_count_kv')}, which is {kv_heads}"
        )
    head_dim = values["attention.key_length"]
    if head_dim % 2:
        raise error(f"{label('attention.key_length')} is {head_dim}, expected an even number")
    if values["rope.dimension_count"] != head_dim:
        found = values["rope.dimension_count"]
        raise error(f"{label('rope.dimension_count')} is {found}, expected {head_dim}, the whole head")
    low, high = "rope.scaling.low_freq_factor", "rope.scaling.high_freq_factor"
    if high in values and not values[low] < values[high]:
        raise error(
            f"{label(high)} is {values[high]}, expected more than {label(low)}, which is {values[low]}"
        )


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


# config.json


def _config_label(key: str) -> str:
    if key == "rope.scaling.type":
        return "config.json: rope_type"
    return f"config.json: {_ALL_NUMBERS[key].config if key in _ALL_NUMBERS else _FLAGS.get(key, key)}"


def _refuse_unknown(config: Mapping[str, Any]) -> None:
    """Refuse options that ask for another computation.

    A key we do not know is refused unless it is at rest (null, false, zero, empty): it may change the
    computation, a warning would scroll by, and the model would be silently wrong. Harmless ones go to _INERT.
    """
    unknown = [key for key, value in config.items() if value and key not in _INERT | _READ]
    if unknown:
        found = f"{_brief(unknown[0])} is {_brief(config[unknown[0]])}"
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise ConvertError(f"config.json: option {found}{more}, which the llama architecture does not know")
    for key, allowed in (
        ("model_type", ("llama", None)),
        ("hidden_act", ("silu", "swish", None)),  # two names of one function
        ("pretraining_tp", (1, None)),
    ):
        if config.get(key) not in allowed:
            raise ConvertError(f"config.json: {key} is {_brief(config[key])}, expected {_brief(allowed[0])}")


def read_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Checked values by metadata key, with transformers' defaults for what is absent or null.

    Raises ConvertError naming the option that is unknown, impossible or asks for another computation.
    """
    _refuse_unknown(config)
    values = _from_config(config)
    _check(values, _config_label, ConvertError)
    return values


def write_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Checked values by metadata key as config.json, RoPE in the form that every transformers reads."""
    numbers = {number.config: values[key] for key, number in _NUMBERS.items()}
    flags = {name: values[key] for key, name in _FLAGS.items()}
    kind = values.get("rope.scaling.type")
    scaling = None
    if kind is not None:
        scaling = {"rope_type": kind} | {
            _SCALING_NUMBERS[key].config: values[key] for key in _SCALING_KEYS[kind]
        }
    return {"model_type": "llama", "hidden_act": "silu", "rope_scaling": scaling} | numbers | flags


def _from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    rope = _rope_options(config)
    found = {key: _or(config.get(number.config), number.default) for key, number in _NUMBERS.items()}
    found["rope.freq_base"] = _or(rope.get("rope_theta"), _NUMBERS["rope.freq_base"].default)
    found["attention.head_count_kv"] = _or(config.get("num_key_value_heads"), found["attention.head_count"])
    found["attention.key_length"] = _or(config.get("head_dim"), _head_dim(config))
    found["rope.dimension_count"] = found["attention.key_length"]
    if (kind := rope.get("rope_type", "default")) != "default":
        found["rope.scaling.type"] = kind
        found |= {key: rope.get(_SCALING_NUMBERS[key].config) for key in _SCALING_KEYS[kind]}
    flags = {key: _or(config.get(name), False) for key, name in _FLAGS.items()}
    return {key: value for key, value in found.items() if value is not None} | flags


def _or(value: Any, default: Any) -> Any:
    """`value` unless it is null: 0 and False are values."""
    return default if value is None else value


def _head_dim(config: Mapping[str, Any]) -> int | None:
    """hidden_size / num_attention_heads when both are numbers; None leaves the error to `check`."""
    width, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if type(width) is not int or type(heads) is not int or heads < 1:
        return None
    if width % heads:
        raise ConvertError(
            f"config.json: hidden_size is {_brief(width)}, expected a multiple of num_attention_heads, "
            f"which is {_brief(heads)}"
        )
    return width // heads


def _rope_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """rope_theta and scaling options in one dict, from either style: `rope_scaling` or `rope_parameters`."""
    options: dict[str, Any] = {}
    for source in ("rope_parameters", "rope_scaling"):
        given = _or(config.get(source), {})
        if not isinstance(given, Mapping):
            raise ConvertError(f"config.json: {source} is {_brief(given)}, expected an object")
        _merge(options, {"rope_type" if key == "type" else key: value for key, value in given.items()})
    _merge(options, {key: config.get(key) for key in _ROPE_OUTSIDE})
    if options.get("rope_type", "default") not in ("default", *_SCALING_KEYS):
        found, names = _brief(options["rope_type"]), ", ".join(_SCALING_KEYS)
        raise ConvertError(f"config.json: rope_type is {found}, expected default, {names}")
    unknown = [key for key in options if key not in _ROPE_READ]
    if unknown:
        raise ConvertError(f"config.json: RoPE option {_brief(unknown[0])} is not supported")
    if options.get("partial_rotary_factor", 1) != 1:
        found = _brief(options["partial_rotary_factor"])
        raise ConvertError(f"config.json: partial_rotary_factor is {found}, expected 1")
    options.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    return options


def _merge(options: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Add what is not null. An option given twice must agree: loaders differ in which one wins."""
    for key, value in given.items():
        if value is None:
            continue
        if key in options and options[key] != value:
            found = f"both {_brief(options[key])} and {_brief(value)}"
            raise ConvertError(f"config.json: {key} is {found}, expected one value")
        options[key] = value
