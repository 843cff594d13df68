"""Refuses a config that says that its weights are quantised: no kind of it runs yet."""

from parallel.models.config_values import Config

#: The second is what compressed-tensors wrote before it had the first.
_KEYS = ("quantization_config", "compression_config")


def require_unquantised(config: Config) -> None:
    """ValueError with the kind of quantisation; its weights, read as they are, would be noise."""
    for key in _KEYS:
        value = config.get(key)
        if value is not None:
            raise ValueError(
                f"config.json has {key} ({_kind(value)}): no quantisation runs yet; serve the checkpoint that it was "
                "quantised from"
            )


def _kind(value: object) -> str:
    """What a quantisation calls itself."""
    named = value.get("quant_method") or value.get("quant_algo") if isinstance(value, dict) else value
    return f"quant_method {named!r}"[:80]
