"""What a config says of the quantisation of its weights: one kind is read for one family, all others are refused."""

from parallel.models.config_values import Config

#: The second is what compressed-tensors wrote before it had the first.
_KEYS = ("quantization_config", "compression_config")
#: The kind whose weights are widened on load, and the family that has it.
_READ = ("mxfp4", "gpt_oss")


def is_mxfp4(config: Config) -> bool:
    """Whether the config says that its experts' weights are MXFP4."""
    return _method(config.get(_KEYS[0])) == _READ[0]


def require_readable(config: Config, *, family: str) -> None:
    """ValueError with the kind of a quantisation that is not read; its weights, read as they are, would be noise."""
    for key in _KEYS:
        value = config.get(key)
        is_read = key == _KEYS[0] and (_method(value), family) == _READ
        if value is not None and not is_read:
            raise ValueError(
                f"config.json has {key} ({_kind(value)}): of quantised weights only {' in '.join(_READ)} runs yet; "
                "serve the checkpoint that it was quantised from"
            )


def _method(value: object) -> object:
    return value.get("quant_method") or value.get("quant_algo") if isinstance(value, dict) else value


def _kind(value: object) -> str:
    """What a quantisation calls itself."""
    return f"quant_method {_method(value)!r}"[:80]
