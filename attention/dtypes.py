"""torch's dtypes by the names that the configuration and the storage give them."""

import torch

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
